"""Tokenized rows → padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = Mapping[str, Sequence[int]]


def pad(rows: Sequence[Row], padding: Mapping[str, int]) -> dict[str, NDArray[np.int64]]:
    """One batch, each input padded on the right to its longest row.

    padding   {input name: the value that pads it}; `attention_mask` need not stand in the rows.
    returns   {input name: (rows, longest), int64}.
    """
    batch = {}
    if "attention_mask" in padding:
        batch["attention_mask"] = _inside(rows, "input_ids").astype(np.int64)
    for name in padding:
        if name != "attention_mask":
            inside = _inside(rows, name)
            values = np.full(inside.shape, padding[name], dtype=np.int64)
            values[inside] = np.concatenate([np.asarray(row[name], dtype=np.int64) for row in rows])
            batch[name] = values
    return batch


def _inside(rows: Sequence[Row], name: str) -> NDArray[np.bool_]:
    """Which places of a batch hold a row's own values, (rows, longest)."""
    lengths = np.array([len(row[name]) for row in rows])
    inside: NDArray[np.bool_] = np.arange(lengths.max()) < lengths[:, None]
    return inside


def padding_of(tokenizer: Any) -> dict[str, int]:
    """What pads each input of the network, in the tokenizer's order."""
    values = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "token_type_ids": tokenizer.pad_token_type_id}
    return {name: int(values[name]) for name in tokenizer.model_input_names}


def batches_of(rows: Sequence[Row], size: int, padding: Mapping[str, int]) -> list[dict[str, NDArray[np.int64]]]:
    """Rows, in the order given, as padded batches of `size`; the last holds what remains.

    raises   ValueError on a size below 1.
    """
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return [pad(rows[start : start + size], padding) for start in range(0, len(rows), size)]


def chunks(order: Sequence[int] | NDArray[np.int64], size: int) -> Iterator[list[int]]:
    """Positions in groups of `size`; the last may be smaller."""
    for start in range(0, len(order), size):
        yield [int(position) for position in order[start : start + size]]


def by_length(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Positions from the shortest row to the longest: batches of such an order hold little padding."""
    return np.argsort(np.asarray(lengths), kind="stable")
