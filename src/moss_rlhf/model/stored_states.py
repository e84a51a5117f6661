"""Hidden states of texts of unequal length on disk: no padding, memory-mapped, found by what the text is.

    FOLDER/part-000/keys.npy  encoder.bin  encoder-lengths.npy  facts.json …

A part is written beside its place and renamed, and never changed. What another training asks for with the same weights
(the next trial of a search, another fold) is read from the parts that stand, and only rows that are new make a new one.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moss_rlhf.files import new_directory, read_json, write_json

Lengths = Mapping[str, NDArray[np.int64]]  # {stack: tokens of each row}

_PLAIN: Mapping[torch.dtype, Any] = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.float16: np.int16}
"""As what NumPy sees it: it has no bfloat16, and nothing is computed here."""


def stored_bytes(lengths: Lengths, hidden: int, dtype: torch.dtype) -> int:
    """Bytes on disk of the states of rows: tokens · hidden · bytes of one number, of all stacks."""
    return sum(int(each.sum()) for each in lengths.values()) * hidden * dtype.itemsize


@dataclass(frozen=True)
class _Part:
    """One part: its rows' keys, and for each stack the flat states and where each row starts."""

    keys: list[str]
    states: Mapping[str, NDArray[Any]]
    starts: Mapping[str, NDArray[np.int64]]

    @classmethod
    def open(cls, place: Path, hidden: int, dtype: torch.dtype) -> _Part:
        states, starts = {}, {}
        for file in sorted(place.glob("*.bin")):
            ends = np.cumsum(np.load(place / f"{file.stem}-lengths.npy"))
            starts[file.stem] = np.concatenate([[0], ends])
            states[file.stem] = np.memmap(file, _PLAIN[dtype], "r", shape=(int(ends[-1]), hidden))
        return cls([key.decode() for key in np.load(place / "keys.npy")], states, starts)


class StoredStates:
    """The states of many rows under one folder.

    hidden   numbers a token; dtype: of each.
    """

    def __init__(self, folder: Path, hidden: int, dtype: torch.dtype) -> None:
        self.folder, self.hidden, self.dtype = folder, hidden, dtype
        self._parts: list[_Part] = []
        self._where: dict[str, tuple[int, int]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Open the parts that were added since, by this process or another."""
        for place in self._places()[len(self._parts) :]:
            part = _Part.open(place, self.hidden, self.dtype)
            self._where |= {key: (len(self._parts), row) for row, key in enumerate(part.keys)}
            self._parts.append(part)

    def _places(self) -> list[Path]:
        return sorted(self.folder.glob("part-*"))

    @property
    def bytes(self) -> int:
        return sum(states.nbytes for part in self._parts for states in part.states.values())

    @property
    def seconds(self) -> float:
        """What filling all parts took."""
        return sum(float(read_json(place / "facts.json")["seconds"]) for place in self._places())

    def missing(self, keys: Sequence[str]) -> list[int]:
        """Positions of the keys that are not stored, one of each."""
        seen: dict[str, int] = {}
        for position, key in enumerate(keys):
            if key not in self._where:
                seen.setdefault(key, position)
        return list(seen.values())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """One process fills at a time; the others wait, and find it filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.refresh()
            yield

    @contextmanager
    def adding(self) -> Iterator[Adding]:
        """A new part, which stands once the block ends."""
        place = self.folder / f"part-{len(self._places()):03d}"
        with new_directory(place) as partial:
            adding = Adding(partial, self.dtype)
            try:
                yield adding
            finally:
                adding.close()
        self.refresh()

    def batch(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """{stack: (rows, longest, hidden)}, padded on the right with zeros."""
        found = [self._where[key] for key in keys]
        return {stack: self._padded(found, stack) for stack in self._parts[0].states}

    def _padded(self, found: Sequence[tuple[int, int]], stack: str) -> Tensor:
        spans = [(part, *self._parts[part].starts[stack][row : row + 2].tolist()) for part, row in found]
        longest = max(stop - start for _, start, stop in spans)
        values = np.zeros((len(spans), longest, self.hidden), dtype=_PLAIN[self.dtype])
        for row, (part, start, stop) in enumerate(spans):
            values[row, : stop - start] = self._parts[part].states[stack][start:stop]
        return torch.from_numpy(values).view(self.dtype)


class Adding:
    """A part while it is written."""

    def __init__(self, place: Path, dtype: torch.dtype) -> None:
        self.place, self.dtype = place, dtype
        self._keys: list[str] = []
        self._lengths: dict[str, list[int]] = {}
        self._files: dict[str, Any] = {}
        self.seconds = 0.0

    def add(self, keys: Sequence[str], states: Mapping[str, Tensor], lengths: Lengths) -> None:
        """Append rows; `states` are {stack: (rows, longest, hidden)} and only `lengths` tokens of each are kept.

        raises   OverflowError where a state is not finite, or not in `dtype`.
        """
        self._keys += keys
        for stack, state in states.items():
            inside = torch.arange(state.shape[1])[None] < torch.from_numpy(lengths[stack])[:, None]
            flat = state.detach().cpu()[inside].to(self.dtype)
            if not bool(flat.isfinite().all()):
                raise OverflowError(f"a hidden state is not finite in {str(self.dtype).removeprefix('torch.')}")
            plain = flat if self.dtype == torch.float32 else flat.view(torch.int16)
            if stack not in self._files:
                self._files[stack] = (self.place / f"{stack}.bin").open("wb")
            self._files[stack].write(plain.contiguous().numpy().data)
            self._lengths.setdefault(stack, []).extend(lengths[stack].tolist())

    def close(self) -> None:
        for stack, file in self._files.items():
            file.close()
            np.save(self.place / f"{stack}-lengths.npy", np.array(self._lengths[stack], dtype=np.int64))
        np.save(self.place / "keys.npy", np.array([key.encode() for key in self._keys]))
        write_json(self.place / "facts.json", {"seconds": self.seconds})
