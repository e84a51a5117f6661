"""What a training holds in memory besides its tensors: freed blocks, and kernels made for shapes that are gone.

Freed memory is kept for the next tensor, on Linux's C library:

glibc asks the kernel for every large block anew and gives it back when it is freed; the kernel zeroes its pages each
time they are touched first. In a training step, which makes and drops the same hundreds of large tensors again and
again, a fourth of the time went there. While `kept_memory` holds, freed blocks stay with the process.

oneDNN makes its bfloat16 kernels anew for each shape, and batches of texts have hundreds: PyTorch and oneDNN keep 1,024
of them each, 5 to 8 MB a length of MiniLM's batches, gigabytes on long texts. Making them again costs nothing that
could be measured (docs/LOG.md), so `bound_kernel_caches` lets them keep few.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from moss_rlhf.model.heap import give_back, glibc

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # mallopt(3)
_DEFAULTS = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 1024 * 1024, _MMAP_MAX: 0}
_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "16"}  # oneDNN's, PyTorch's on top of it


def bound_kernel_caches() -> None:
    """Before the first product in bfloat16: both caches read their bounds once. What the user has set stays."""
    for name, kernels in _KERNELS.items():
        os.environ.setdefault(name, kernels)


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed until the end, then give it back. On other C libraries nothing happens."""
    library = glibc()
    if library is None:
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _DEFAULTS)
        give_back()


def _set(library: ctypes.CDLL, values: dict[int, int]) -> None:
    for name, value in values.items():
        library.mallopt(name, value)
