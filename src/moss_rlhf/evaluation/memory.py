"""Peak memory: of serving an artifact, in a process of its own; and of a stage, in this one. Bytes resident in RAM."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Sequence
from types import TracebackType

from moss_rlhf.progress import Progress

_SAMPLE_SECONDS = 0.02


def peak_memory(
    command: Sequence[str], *, progress: Progress | None = None, timeout_seconds: float = 600
) -> int | None:
    """Run a command in a fresh process and read the bytes that it reports: the last line it prints, from `own_peak()`.

    A measurement that fails does not end a run: the result is None, and `progress` says why.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout_seconds)  # noqa: S603  # our own command, no shell
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        if progress is not None:
            progress.say(f"Peak memory was not measured: {_reason(error)}")
        return None


class PeakMemory:
    """The most bytes that this process holds in RAM during a block, sampled every 20 ms.

    with PeakMemory() as peak: …; then `peak.bytes`. What is freed within 20 ms may be missed, and child processes do
    not count.
    """

    def __init__(self) -> None:
        import psutil

        self.bytes = 0
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)


def _reason(error: Exception) -> str:
    """The error in one line; of a command that failed, the last line it wrote to standard error."""
    complaint = (error.stderr or "").strip().splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    return complaint[-1] if complaint else str(error)
