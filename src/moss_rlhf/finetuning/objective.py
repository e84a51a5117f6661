"""What a training makes small: the loss of the labels, and of a teacher's answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moss_rlhf.finetuning.distillation import Teaching
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


class Objective:
    """The mean loss of a batch, (), float32.

    task       whose loss the labels have.
    teaching   what is learned from a teacher beside it.
    """

    def __init__(self, task: Task, teaching: Teaching | None = None) -> None:
        self.task, self.teaching = task, teaching

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        passed = self._forward(network, batch)
        loss = self.task.loss(passed.outputs.logits, batch["labels"])
        return loss if self.teaching is None else self.teaching.mixed(loss, passed)

    def _forward(self, network: Any, batch: Mapping[str, Tensor]) -> Pass:
        names = set(batch) - set(ROW_COLUMNS)
        given = self.task.inputs(network, {name: batch[name] for name in batch if name in names})
        return Pass(batch, given, network(**given))


ROW_COLUMNS = ("teacher_logits", "row")
"""What a batch carries that is no input of the network; `row` is each row's position among the training rows."""
