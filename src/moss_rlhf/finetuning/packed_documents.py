"""Several documents in one row, so that nothing is padded, and none of them sees another."""

from __future__ import annotations

from typing import Any

import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.recipe.pairs import packing_fault
from moss_rlhf.tasks import TASKS, TextGeneration

_TOLERANCE = 1e-3  # of logits: float32 in another order of summation moves them by 1e-6, another document by 1


def check_packing(model: Model, train: Any) -> TextGeneration:
    """The task, whose `pack` makes the batches.

    raises   ModelError where the task has no documents, or where the network lets one packed document see another:
             told by its answers to two rows, packed and apart.
    """
    task = TASKS[model.task]
    if not isinstance(task, TextGeneration):
        raise ModelError(f"finetune.{packing_fault(model.task)}")
    rows = [dict(row) for row in train.select(range(min(2, len(train))))]
    difference = _difference(model.network.eval(), task, rows)
    if difference > _TOLERANCE:
        kind = model.network.config.model_type
        raise ModelError(
            f"finetune.packing: a network of type {kind} lets packed documents see one another (its logits differ by "
            f"{difference:.2g}). Leave packing out; batches of similar lengths hold little padding."
        )
    return task


@torch.no_grad()
def _difference(network: Any, task: TextGeneration, rows: list[Any]) -> float:
    packed = {name: value for name, value in task.pack(rows).items() if name != "labels"}
    together = network(**packed, use_cache=False).logits[0]
    apart = [network(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0] for row in rows]
    return float((together - torch.cat(apart)).abs().max())
