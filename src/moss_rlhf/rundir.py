"""The run directory: what is finished, what goes on, and that only one process writes it.

stages/01-finetune-3f9a/   model/  facts.json  done (the whole fingerprint; written last)  work/ (only while it runs)
                           tensorboard/ (where the recipe reports to it)
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.errors import MachineError
from moss_rlhf.files import keep_curves, read_json, write_json, write_text

_LOCK = ".lock"  # the first file of a run; a directory that has it is ours
_WRITTEN = (
    "stages",
    "data",
    "model",
    "onnx",
    "ctranslate2",
    "compressed-tensors",
    "work",
    "search",
    "report.json",
    "report.html",
    "findings.csv",
    "collected.csv",
    "log.jsonl",
)


@dataclass(frozen=True)
class StageFolder:
    """Where one stage works and leaves its result."""

    path: Path
    fingerprint: str

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def work(self) -> Path:
        return self.path / "work"

    @property
    def done(self) -> bool:
        mark = self.path / "done"
        marked = mark.is_file() and mark.read_text(encoding="utf-8").strip() == self.fingerprint
        return marked and self.model.is_dir()

    def read(self) -> dict[str, Any]:
        facts: dict[str, Any] = read_json(self.path / "facts.json")
        return facts

    def finish(self, facts: dict[str, Any]) -> None:
        """Keep the curves and the facts and mark the stage as done; its model stands already."""
        keep_curves(self.work, self.path)
        write_json(self.path / "facts.json", facts)
        write_text(self.path / "done", self.fingerprint + "\n")
        shutil.rmtree(self.work, ignore_errors=True)


@dataclass(frozen=True)
class RunDirectory:
    path: Path

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def findings(self) -> Path:
        """What cleaning the data found."""
        return self.path / "findings.csv"

    @property
    def collected(self) -> Path:
        """The rows that data.collect chose."""
        return self.path / "collected.csv"

    @property
    def data(self) -> Path:
        return self.path / "data"

    def stage(self, index: int, kind: str, fingerprint: str) -> StageFolder:
        """The folder of a stage; another recipe's stage of the same short fingerprint is never touched."""
        for digits in (4, 12, 64):
            folder = StageFolder(self.path / "stages" / f"{index + 1:02d}-{kind}-{fingerprint[:digits]}", fingerprint)
            owner = folder.path / "fingerprint"
            if not owner.exists() or owner.read_text(encoding="utf-8").strip() == fingerprint:
                write_text(owner, fingerprint + "\n")
                if folder.done:
                    shutil.rmtree(folder.work, ignore_errors=True)  # killed after the mark, before this
                return folder
        raise AssertionError("two fingerprints of 64 equal digits")


@contextmanager
def open_run(path: Path, fresh: bool = False) -> Iterator[RunDirectory]:
    """The run directory, made where it is missing, locked while the block runs.

    fresh    start over: remove what an earlier run left in it.
    raises   MachineError where it can't be written, holds something that is no run, or another process writes it.
    """
    try:
        _claim(path)
        with (path / _LOCK).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MachineError(
                    f"output: another moss run is writing {path}. Wait for it, or give another output."
                ) from None
            _clear(path, fresh)
            yield RunDirectory(path)
    except PermissionError as error:
        raise MachineError(
            f"output: no permission to write {error.filename or path}. Give an output that you may write."
        ) from None


def _claim(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise MachineError(f"output: {path} is a file. Give the path of a directory.")
    refuse_foreign(path)
    path.mkdir(parents=True, exist_ok=True)


def refuse_foreign(path: Path) -> None:
    """MachineError where a directory holds files that no run wrote: nothing of the user's is ever overwritten."""
    if path.is_dir() and any(path.iterdir()) and not (path / _LOCK).exists():
        raise MachineError(
            f"output: {path} is not empty and no run of moss wrote it. Give another output, or empty it."
        )


def _clear(path: Path, fresh: bool) -> None:
    """Remove what a killed run left half-written, and if fresh, all that runs write; the user's own files stay."""
    written = [path / name for name in _WRITTEN] if fresh else []
    for leftover in [*written, *path.rglob(".*.partial")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink(missing_ok=True)
