"""How long a person waits before anything happens: `moss --help` and `moss check`, five fresh processes each."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import keep, table

MOSS = Path(sys.executable).with_name("moss")


def seconds(*arguments: str) -> float:
    started = time.perf_counter()
    subprocess.run([MOSS, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    rows = []
    for arguments, asked in (((("--help"),), "≤ 0.5 s"), (("check", "recipes/quickstart.yaml"), "≤ 5 s")):
        times = [seconds(*arguments) for _ in range(5)]
        rows.append(
            (f"moss {' '.join(arguments)}", f"{statistics.median(times):.2f} s (first {times[0]:.2f} s)", asked)
        )
    keep("startup", table("Waiting for the command", rows))


if __name__ == "__main__":
    main()
