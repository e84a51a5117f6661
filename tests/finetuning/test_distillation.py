"""The teacher's loss against its closed form in float64, and its gradient."""

import numpy as np
import pytest
import torch

from moss_rlhf.finetuning.distillation import distillation_loss, mixed_loss

RANDOM = np.random.default_rng(11)
STUDENT, TEACHER = RANDOM.normal(size=(5, 3)) * 3, RANDOM.normal(size=(5, 3)) * 3


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.5])
def test_closed_form(temperature):
    p, q = _softmax(TEACHER / temperature), _softmax(STUDENT / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()
    loss = distillation_loss(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature)
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_zero_where_student_and_teacher_agree():
    shifted = torch.tensor(TEACHER + 4.0)  # softmax forgets a constant
    assert float(distillation_loss(shifted, torch.tensor(TEACHER), 2.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_by_hand(temperature):
    """d/d student = T · (softmax(student / T) − softmax(teacher / T)) / rows: its size does not shrink with T."""
    student = torch.tensor(STUDENT, requires_grad=True)
    distillation_loss(student, torch.tensor(TEACHER), temperature).backward()
    expected = temperature * (_softmax(STUDENT / temperature) - _softmax(TEACHER / temperature)) / len(STUDENT)
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)


def test_mixture():
    assert float(mixed_loss(torch.tensor(2.0), torch.tensor(10.0), 0.75)) == 8.0
