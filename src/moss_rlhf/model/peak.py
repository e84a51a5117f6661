"""The peak memory of this process. Imports nothing heavy: what is measured must not be the measuring."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def own_peak() -> int:
    """The most bytes that this process has held in RAM since it started.

    VmHWM of /proc/self/status. `ru_maxrss` is only for systems without it: Linux hands the parent's peak down through
    exec, so a small child of a large process would report the large one.
    """
    return _high_water_mark(_STATUS.read_text(encoding="utf-8") if _STATUS.exists() else "") or _maxrss()


def _high_water_mark(status: str) -> int | None:
    """VmHWM in bytes; None where the text has no such line."""
    lines = (line.split() for line in status.splitlines() if line.startswith("VmHWM:"))
    return next((int(kibibytes) * 1024 for _, kibibytes, _ in lines), None)


def _maxrss() -> int:
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
