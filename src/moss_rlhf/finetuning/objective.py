"""What a training makes small: the loss of the labels, and of a teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moss_rlhf.finetuning.distillation import Teaching
from moss_rlhf.finetuning.losses import LabelLoss, disagreement
from moss_rlhf.tasks import Task


@dataclass(frozen=True)
class Pass:
    """One forward pass of a batch.

    batch     as collated: inputs, labels, and whatever else the rows carry.
    given     what the network was called with.
    outputs   what it returned.
    """

    batch: Mapping[str, Tensor]
    given: Mapping[str, Tensor]
    outputs: Any


class Goal(Protocol):
    """What the trainer asks of an objective."""

    @property
    def passes(self) -> int:
        """Forward and backward passes a batch."""

    def targets(self, labels: Tensor) -> int:
        """How many of a batch's labels its mean loss counts."""

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch, (), float32."""


class Objective:
    """The mean loss of a batch, (), float32.

    task       whose loss the labels have.
    teaching   what is learned from a teacher beside it.
    labelled   what is asked of the labels instead of the task's own loss. With its `r_drop` α each batch passes twice,
               and the loss is half of Liang et al.'s eq. 4 (arXiv:2106.14448): the mean of both passes' losses and
               α/2 of their disagreement.
    """

    def __init__(self, task: Task, teaching: Teaching | None = None, labelled: LabelLoss | None = None) -> None:
        self.task, self.teaching, self.labelled = task, teaching, labelled

    @property
    def agreement(self) -> float:
        """α of R-Drop."""
        return self.labelled.options.r_drop if self.labelled else 0.0

    @property
    def passes(self) -> int:
        """Forward and backward passes a batch."""
        return 2 if self.agreement else 1

    def targets(self, labels: Tensor) -> int:
        """How many of a batch's labels its mean loss counts."""
        return self.task.targets(labels)

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        passed = [self._forward(network, batch) for _ in range(self.passes)]
        loss = torch.stack([self._loss(one) for one in passed]).mean()
        if not self.agreement:
            return loss
        answers = [self.task.at_targets(one.outputs.logits, batch["labels"]) for one in passed]
        return loss + self.agreement / 2 * disagreement(*answers)

    def _loss(self, passed: Pass) -> Tensor:
        labelled = self.labelled or self.task.loss
        loss = labelled(passed.outputs.logits, passed.batch["labels"])
        return loss if self.teaching is None else self.teaching.mixed(loss, passed)

    def _forward(self, network: Any, batch: Mapping[str, Tensor]) -> Pass:
        names = set(batch) - set(ROW_COLUMNS)
        given = self.task.inputs(network, {name: batch[name] for name in batch if name in names})
        return Pass(batch, given, network(**given))


ROW_COLUMNS = ("teacher_logits", "row")
"""What a batch carries that is no input of the network; `row` is each row's position among the training rows."""
