"""Files that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moss_rlhf.errors import MachineError


@contextmanager
def new_directory(place: Path) -> Iterator[Path]:
    """A directory that appears at `place`, whole, when the block ends, for what stood there; or none, on an error."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}-", suffix=".partial", dir=place.parent))
    partial.chmod(0o755)
    try:
        yield partial
        if place.exists():
            shutil.rmtree(place)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_REPLACEABLE = re.compile(  # what save_pretrained and our export write
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|model.*\.(safetensors|safetensors\.index\.json|onnx)|vocab\.txt|merges\.txt|.*\.model|chat_template\.jinja"
)


def refuse_foreign_files(place: Path) -> None:
    """MachineError unless `place` is free, empty, or an earlier checkpoint or export, which may be replaced."""
    if place.is_dir():
        children = list(place.iterdir())
        ours = (place / "config.json").is_file() and all(
            child.is_file() and _REPLACEABLE.fullmatch(child.name) for child in children
        )
        if ours or not children:
            return
    if place.exists():
        raise MachineError(f"{place}: holds files of yours; nothing is overwritten. Give a new directory.")


@contextmanager
def new_file(place: Path) -> Iterator[Path]:
    """A file that appears at `place`, whole, when the block ends."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def copy_directory(source: Path, place: Path) -> None:
    """A copy of a directory's files at `place`, whole or not at all."""
    with new_directory(place) as partial:
        shutil.copytree(source, partial, dirs_exist_ok=True)


CURVES = "tensorboard"  # the tracker that writes files, and the folder they stand in


def keep_curves(work: Path, place: Path) -> None:
    """Copy what trackers wrote out of a workspace that goes: `work/part/tensorboard` → `place/tensorboard/part`."""
    for found in sorted(work.rglob(CURVES)):
        shutil.copytree(found, place / CURVES / found.relative_to(work).parent, dirs_exist_ok=True)


def write_text(place: Path, text: str) -> None:
    with new_file(place) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(place: Path, value: Any) -> None:
    write_text(place, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(place: Path) -> Any:
    return json.loads(place.read_text(encoding="utf-8"))


def digest(value: Any) -> str:
    """64 hexadecimal digits that name a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(place: Path) -> str:
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_DISK_FAULTS = {
    errno.ENOSPC: "no space is left on the disk. Free some, or give an output on another disk; run again to go on.",
    errno.EDQUOT: "the disk quota is used up. Free some space, or give an output elsewhere; run again to go on.",
    errno.EROFS: "the file system is read-only. Give an output that you may write.",
    errno.EACCES: "no permission. Give a path that you may read and write.",
    errno.EPERM: "not permitted. Give a path that you may read and write.",
    errno.ENOTDIR: "a part of this path is a file, not a directory. Give another path.",
    errno.EEXIST: "is a file, and a directory is needed there. Give another path.",
    errno.ENAMETOOLONG: "the name is too long. Give a shorter one.",
}


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk, where that is what an error, or what caused it, says; else None."""
    seen: BaseException | None = error
    while seen is not None:
        for code, sentence in _DISK_FAULTS.items():
            if getattr(seen, "errno", None) == code or os.strerror(code) in str(seen):
                return f"{getattr(seen, 'filename', None) or 'output'}: {sentence}"
        if "PytorchStreamWriter failed writing" in str(seen):  # torch's only word for a full disk
            return f"output: {_DISK_FAULTS[errno.ENOSPC]}"
        seen = seen.__cause__ or seen.__context__
    return None
