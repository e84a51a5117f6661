"""How long the texts are in tokens, and how much of them a limit cuts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

_AUTO_PERCENTILE = 99
_MULTIPLE = 8
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


def length_facts(lengths: Lengths, max_length: int) -> dict[str, float]:
    """Mean, 99th percentile and longest length in tokens, the limit, and the share of texts that it cuts."""
    values = np.asarray(lengths)
    return {
        "mean": float(values.mean()),
        "p99": float(np.percentile(values, 99)),
        "max": int(values.max()),
        "max_length": max_length,
        "cut_share": float((values > max_length).mean()),
    }
