"""Which tokens of a text that is too long a classifier reads. Saved with the checkpoint: serving reads the same.

head        the first ones;  tail  the last ones
head+tail   the first quarter of the room and the last three quarters: 128 + 382 of 510
            (Sun et al. 2019, arXiv:1905.05583, §5.3.1)
windows     all of them, in windows that overlap by a quarter; a text's logits are the mean of its windows'

Special tokens stand around what is kept, as around a text that fits. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import ModelError

Keep = Literal["head", "tail", "head+tail", "windows"]
_OVERLAP = 4  # a window shares a quarter of its room with the next


@dataclass(frozen=True)
class Cut:
    """How long texts are cut: what is kept, and how many tokens of a row, special ones included."""

    keep: Keep
    max_length: int

    def declared(self) -> dict[str, Any]:
        """As it stands in config.json."""
        return {"keep": self.keep, "max_length": self.max_length}

    @staticmethod
    def read(declared: Mapping[str, Any] | None, place: object) -> Cut | None:
        """What config.json declares; None where it says nothing.

        raises   ModelError where it says what can't be.
        """
        if declared is None:
            return None
        keep, length = declared.get("keep"), declared.get("max_length")
        known: dict[str, Keep] = {name: name for name in get_args(Keep)}
        if keep not in known or not isinstance(length, int) or length < 1:
            raise ModelError(
                f"{place}: config.json declares the cut {dict(declared)}; keep must be one of "
                f"{', '.join(known)}, max_length a whole number from 1. Save the checkpoint again."
            )
        return Cut(known[keep], length)

    def rows(self, special: Sequence[int]) -> list[NDArray[np.int64]]:
        """The places of a text's tokens that make its rows: one row, or a window each.

        special   of each token, whether the tokenizer put it around the text (1) or not (0).
        raises    ValueError where there is no room for any token of the text.
        """
        length = len(special)
        if length <= self.max_length:
            return [np.arange(length)]
        first, last = _ends(special)
        room = self.max_length - first - last
        if room < 1:
            raise ValueError(f"max_length {self.max_length} leaves no room beside {first + last} special tokens")
        before, after = np.arange(first), np.arange(length - last, length)
        return [
            np.concatenate([before, first + body, after])
            for body in kept_places(length - first - last, room, self.keep)
        ]


def kept_places(length: int, room: int, keep: Keep) -> list[NDArray[np.int64]]:
    """Places of a text of `length` tokens, without special ones, that are kept where `room` are: rising, a row each."""
    places = np.arange(length)
    if length <= room:
        return [places]
    if keep == "head+tail":
        first = -(-room // 4)
        return [np.concatenate([places[:first], places[length - room + first :]])]
    if keep == "windows":
        return [places[start : start + room] for start in _starts(length, room)]
    return [places[:room] if keep == "head" else places[-room:]]


def _starts(length: int, room: int) -> list[int]:
    """Where windows begin: the last one ends with the text."""
    step = max(1, room - room // _OVERLAP)
    return [*range(0, length - room, step), length - room]


def _ends(special: Sequence[int]) -> tuple[int, int]:
    """How many special tokens stand before and after a text."""
    inside = np.flatnonzero(np.asarray(special) == 0)
    return int(inside[0]), len(special) - 1 - int(inside[-1])


def pool_windows(logits: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """The mean of each text's windows: (windows, classes), (windows,) → (texts, classes).

    rows   which text a window is of; the texts come out in the order of these numbers.
    """
    _, texts, counts = np.unique(rows, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), logits.shape[1]))
    np.add.at(sums, texts, logits)
    return (sums / counts[:, None]).astype(np.float32)
