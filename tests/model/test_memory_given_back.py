"""Freed memory goes back to the system."""

import re
import sys
from pathlib import Path

import pytest
import torch

from moss_rlhf.model.heap import give_back, glibc

PIECES, FLOATS = 40, 4 * 2**20 // 4  # 160 MiB in blocks that glibc keeps


def anonymous_bytes():
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux" or glibc() is None, reason="needs glibc")
def test_what_was_freed_among_what_is_kept_is_given_back():
    torch.zeros(2**22).add_(1)  # 16 MiB freed: from now on glibc takes smaller blocks from its heap
    kept, freed = [], []
    for _ in range(PIECES):
        freed.append(torch.ones(FLOATS))
        kept.append(torch.ones(2**14))
    full = anonymous_bytes()
    freed.clear()
    give_back()
    assert anonymous_bytes() < full - 0.8 * PIECES * 4 * FLOATS
    assert all(bool((piece == 1).all()) for piece in kept)
