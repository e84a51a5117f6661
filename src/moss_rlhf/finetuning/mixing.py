"""Mixup while training: what leaves the highest block is mixed among a batch's rows, and so are their labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import one_hot

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.model.anatomy import anatomy_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.replay import first
from moss_rlhf.recipe.pairs import mixup_fault
from moss_rlhf.strategy.augmentation import Mixed, mixup, mixup_loss
from moss_rlhf.tasks import TASKS


class MixedObjective(Objective):
    """Cross-entropy of mixed labels, of states mixed likewise (Verma et al. 2019, arXiv:1806.05236, at the last block).

    Which rows meet, and how much of each, is drawn from the seed and the batch's rows: a resumed run mixes the same.

    alpha    of the Beta distribution; 0.1 to 0.4 are usual.
    raises   RecipeError where the task has no classes, or one block is all layers.
    """

    def __init__(self, model: Model, alpha: float, seed: int) -> None:
        super().__init__(TASKS[model.task])
        classes, shared = self.task.has_classes, model.anatomy.family.shared
        if fault := mixup_fault(model.task, classes=classes, kind=model.network.config.model_type, shared=shared):
            raise RecipeError(f"finetune.{fault}")
        self.classes, self.alpha, self.seed = len(model.labels), alpha, seed

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        targets = one_hot(batch["labels"], self.classes).float()
        with _mixing(network, batch, targets, self.alpha, self.seed) as found:
            logits = self._forward(network, batch).outputs.logits
        return mixup_loss(logits, found[-1].targets)


@contextmanager
def _mixing(
    network: Any, batch: Mapping[str, Tensor], targets: Tensor, alpha: float, seed: int
) -> Iterator[list[Mixed]]:
    """While the network runs, the states that leave its last block are mixed; collects what was drawn."""
    found: list[Mixed] = []
    last = anatomy_of(network).blocks[-1].module

    def mix(_: Any, __: Any, output: Any) -> Any:
        random = np.random.default_rng([seed, *batch["row"].tolist()])
        found.append(mixup(first(output), targets, alpha, random, batch.get("attention_mask")))
        return (found[-1].hidden, *output[1:]) if isinstance(output, tuple) else found[-1].hidden

    handle = last.register_forward_hook(mix)
    try:
        yield found
    finally:
        handle.remove()
