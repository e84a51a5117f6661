"""Learn from the uncompressed parent's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax

from moss_rlhf.finetuning.options import Distillation
from moss_rlhf.tasks import Task

if TYPE_CHECKING:
    from moss_rlhf.finetuning.objective import Pass


@dataclass(frozen=True)
class Taught:
    """What a teacher answers."""

    logits: Tensor


@dataclass(frozen=True)
class LargerTeacher:
    """A teacher whose vocabulary the student's was cut from: it is asked, and answers, in the student's ids.

    network   called with token ids by their names; of a language model gives logits (batch, length, tokens).
    ids       (tokens of the student,) int64: the teacher's id of each; -1 where the student's table has no token.
    speaks    whether it answers with logits for tokens: its probabilities are then those of the tokens that the
              student has, softmax over the columns `ids`. A classifier's answers stay as they are.
    """

    network: Callable[..., Any]
    ids: Tensor
    speaks: bool = True

    def __call__(self, **given: Tensor) -> Taught:
        own = {name: self.ids[value] if name.endswith("input_ids") else value for name, value in given.items()}
        every: Tensor = self.network(**own).logits
        if not self.speaks:
            return Taught(every)
        logits = every[..., self.ids.clamp(min=0)]
        return Taught(logits.masked_fill(self.ids < 0, torch.finfo(logits.dtype).min))


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), the mean over rows, or over target tokens.

    The factor T² keeps the gradient's size (Hinton et al. 2015, arXiv:1503.02531, §2).

    student, teacher   (rows or tokens, classes) logits; computed in float32.
    """
    log_student = log_softmax(student.float() / temperature, dim=-1)
    target = softmax(teacher.float() / temperature, dim=-1)
    return temperature**2 * kl_div(log_student, target, reduction="batchmean")


def mixed_loss(label_loss: Tensor, teacher_loss: Tensor, weight: float) -> Tensor:
    """Weight · teacher's + (1 - weight) · labels'."""
    return torch.lerp(label_loss, teacher_loss, weight)


@dataclass(frozen=True)
class Teaching:
    """How a teacher's answers enter the loss.

    network   asked at every step; None: its logits are the rows' column `teacher_logits`.
    """

    task: Task
    options: Distillation
    network: Any = None

    def mixed(self, label_loss: Tensor, passed: Pass) -> Tensor:
        """The labels' loss and the teacher's, weighted."""
        labels = passed.batch["labels"]
        student, taught = (
            self.task.at_targets(logits, labels) for logits in (passed.outputs.logits, self._answers(passed))
        )
        learned = distillation_loss(student, taught, self.options.temperature)
        return mixed_loss(label_loss, learned, self.options.weight)

    def _answers(self, passed: Pass) -> Tensor:
        if self.network is None:
            return passed.batch["teacher_logits"]
        with torch.no_grad():
            logits: Tensor = self.network(**passed.given).logits
        return logits
