"""Learn from the uncompressed parent's answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, softmax


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
