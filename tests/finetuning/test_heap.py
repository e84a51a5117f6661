"""Freed memory is kept while it is asked for."""

import subprocess
import sys

import pytest
import torch

from moss_rlhf.finetuning import heap
from moss_rlhf.finetuning.heap import kept_memory

# in a process of its own: what other tests did to the C library's settings would show
CHILD = """
import resource, torch
from moss_rlhf.finetuning.heap import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
without = min(faults(), faults())
with kept_memory():
    faults(), faults()
    print(without, faults())
"""


@pytest.mark.skipif(sys.platform != "linux" or heap._glibc() is None, reason="glibc's")
def test_a_tensor_takes_the_pages_of_the_one_before():
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    without, within = map(int, said.split())
    assert without > 10_000
    assert within < 1000


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with kept_memory():
        assert torch.ones(2).sum() == 2
