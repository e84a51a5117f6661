"""Rows that the methods measure the network on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moss_rlhf.errors import DataError
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.latency import compare_seconds
from moss_rlhf.model.memory import rows_at_once
from moss_rlhf.model.replay import Batch
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.batching import by_length, chunks

_ROWS_TIMED = 8


def calibration_rows(encoded: Any, rows: int, seed: int) -> Any:
    """A seeded sample of encoded rows, sorted by length so that batches hold little padding.

    raises   DataError where there are none, or none are asked for.
    """
    if rows < 1:
        raise DataError(f"calibration: rows {rows} would measure on nothing; give at least 1.")
    if len(encoded) == 0:
        raise DataError("calibration: there are no rows to measure the network on; give training rows.")
    chosen = np.random.default_rng(seed).permutation(len(encoded))[:rows]
    sample = encoded.select(np.sort(chosen))
    return sample.select(by_length(sample["length"]))


def labelled_batches(model: Model, sample: Any) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """(inputs, labels) of a sample, in its order, on the network's device; zeros where the rows have no labels."""
    device, task = next(model.network.parameters()).device, TASKS[model.task]
    longest = max(sample["length"], default=1)
    for positions in chunks(range(len(sample)), rows_at_once(longest)):
        rows = [sample[position] for position in positions]
        batch = {name: value.to(device) for name, value in task.collate(rows, model.tokenizer).items()}
        yield task.inputs(model.network, batch), batch.get("labels", torch.zeros(len(rows), dtype=torch.int64))


def mean_loss(model: Model, sample: Any) -> float:
    """The task's mean loss over a sample's rows, or its target tokens; evaluation mode."""
    task = TASKS[model.task]
    model.network.eval()
    with torch.inference_mode():
        found = [
            (float(task.loss(model.network(**inputs).logits, labels, reduction="sum")), task.targets(labels))
            for inputs, labels in labelled_batches(model, sample)
        ]
    return sum(loss for loss, _ in found) / sum(targets for _, targets in found)


def compare_speed(
    before: Callable[..., Any],
    after: Callable[..., Any],
    batches: Sequence[Batch],
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> str:
    """How long two networks take to answer, in turns, 2 seconds or so in all; in words.

    batches   by ascending length; a few rows of the middle one are answered.
    within    what `after` needs to be in while it answers; not timed.
    """
    inputs, labels = batches[len(batches) // 2]
    rows = min(_ROWS_TIMED, len(labels))
    few = {name: value[:rows] for name, value in inputs.items()}
    with torch.inference_mode():
        return str(compare_seconds(lambda: before(**few), lambda: after(**few), rows=rows, within=within))
