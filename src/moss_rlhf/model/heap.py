"""The C library's heap: freed memory may stay with the process, in pieces that nothing large fits into."""

from __future__ import annotations

import ctypes
import sys


def glibc() -> ctypes.CDLL | None:
    """Linux's C library; None on other systems."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def give_back() -> None:
    """Give freed memory back to the system. On other C libraries nothing happens.

    glibc keeps freed blocks of up to 32 MB, and a network's matrices are of many sizes: gone through block by block,
    it held 40 MB more after each (docs/LOG.md).
    """
    library = glibc()
    if library is not None:
        library.malloc_trim(0)
