"""How long the texts are in tokens, and how much of them a limit cuts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_AUTO_PERCENTILE = 99
_MULTIPLE = 8
_LANGUAGE_ROW = 1024  # tokens: some models have positions for a hundred times as many, and memory for none
Lengths = Sequence[int] | NDArray[np.int64]


def choose_max_length(wanted: int | Literal["auto"], lengths: Lengths, limit: int) -> int:
    """Tokens kept of each text: as wanted, or the 99th percentile rounded up to a multiple of 8; never above `limit`.

    lengths   tokens of the training texts, uncut.
    limit     what the model has positions for.
    """
    if wanted != "auto":
        return min(wanted, limit)
    percentile = int(np.ceil(np.percentile(lengths, _AUTO_PERCENTILE)))
    return min(limit, -(-percentile // _MULTIPLE) * _MULTIPLE)


def row_lengths(lengths: Lengths, max_length: int, cuts: bool) -> NDArray[np.int64]:
    """Tokens of the rows that texts become: cut at `max_length`, or going on in rows that begin with the last token."""
    values = np.asarray(lengths, dtype=np.int64)
    if cuts:
        return np.minimum(values, max_length)
    rows = [min(max_length, int(length) - start) for length in values for start in range(0, length - 1, max_length - 1)]
    return np.array(rows or [2], dtype=np.int64)


def longest_row(wanted: int | Literal["auto"], limit: int) -> int:
    """The most tokens of a language model's row: what it has positions for, unasked no more than 1024."""
    return min(limit, _LANGUAGE_ROW) if wanted == "auto" else limit


def length_facts(lengths: Lengths, max_length: int, cuts: bool = True) -> dict[str, float]:
    """Mean, 99th percentile and longest length in tokens, the limit, and the share of texts that it cuts.

    cuts   False where what is longer goes on in another row, so that nothing is lost.
    """
    values = np.asarray(lengths)
    return {
        "mean": float(values.mean()),
        "p99": float(np.percentile(values, 99)),
        "max": int(values.max()),
        "max_length": max_length,
        "cut_share": float((values > max_length).mean()) if cuts else 0.0,
    }
