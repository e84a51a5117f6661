"""Learn from the uncompressed parent's answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax


@dataclass(frozen=True)
class Taught:
    """What a teacher answers."""

    logits: Tensor


@dataclass(frozen=True)
class LargerTeacher:
    """A language model whose vocabulary the student's was cut from: it is asked, and answers, in the student's ids.

    network   called with token ids by their names; gives logits (batch, length, tokens).
    ids       (tokens of the student,) int64: the teacher's id of each; -1 where the student's table has no token.

    Its probabilities are those of the tokens that the student has: softmax over the columns `ids`.
    """

    network: Callable[..., Any]
    ids: Tensor

    def __call__(self, **given: Tensor) -> Taught:
        own = {name: self.ids[value] if name.endswith("input_ids") else value for name, value in given.items()}
        logits = self.network(**own).logits[..., self.ids.clamp(min=0)]
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
