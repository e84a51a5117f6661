"""Penalties have the gradients they claim, L1 gives exact zeros that stay, and nothing frozen moves."""

import pytest
import torch

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.regularisers import Ridge, TowardsStart, soft_threshold
from moss_rlhf.model.checkpoint import save_checkpoint
from moss_rlhf.tasks.loading import load

SGD = {"batch_size": 8, "schedule": "constant", "warmup": 0.0, "precision": "float32", "weight_decay": 0.0,
       "optimizer": {"name": "sgd", "momentum": 0.0}, "max_gradient_norm": 1e9}  # fmt: skip


def test_soft_threshold_by_hand():
    found = soft_threshold(torch.tensor([3.0, -3.0, 0.5, -0.5, 0.0, 1.0]), 1.0)
    assert found.tolist() == [2.0, -2.0, 0.0, 0.0, 0.0, 0.0]


def test_soft_threshold_is_the_proximal_map():
    """It makes (x − w)² / 2 + t |x| least: no point of a fine grid is better."""
    for w in (-1.3, -0.2, 0.0, 0.7):
        grid = torch.linspace(-2, 2, 4001, dtype=torch.float64)
        best = grid[((grid - w) ** 2 / 2 + 0.4 * grid.abs()).argmin()]
        assert float(soft_threshold(torch.tensor(w, dtype=torch.float64), 0.4)) == pytest.approx(float(best), abs=1e-3)


def test_penalties_have_the_gradients_of_their_formulas(tiny_model):
    groups = layer_groups(tiny_model().network)
    ridge, start = Ridge(groups, 0.3), TowardsStart(groups, 0.5)
    still = start.penalty()
    assert still is not None
    still.backward()  # at the start itself
    weight = dict(groups[1].parameters)["attention.self.query.weight"]
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.25)
    sum((ridge.penalty(), start.penalty())).backward()
    torch.testing.assert_close(weight.grad, 0.3 * weight.detach() + 0.5 * (weight.detach() - before))
    head = dict(groups[-1].parameters)
    classifier = next(value for name, value in head.items() if name.endswith("classifier.weight"))
    torch.testing.assert_close(classifier.grad, 0.3 * classifier.detach())  # the head has no start to go back to
    assert all(value.grad is None for group in groups for _, value in group.parameters if value.dim() == 1)


@pytest.mark.parametrize("penalty", ["l2", "l2_start", "l1"])
def test_a_penalty_pulls_and_what_is_frozen_stays(tiny_model, rows, penalty):
    """Gradual unfreezing of 5 groups over 10 steps: after one step, all but the head are as they were."""
    model = tiny_model()
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    settings = SGD | {"batch_size": 60, "epochs": 1, "learning_rate": 1e-3, "unfreeze": "gradual"}
    finetune(model, rows, rows, **settings, **{penalty: 5.0})
    for name, value in model.network.state_dict().items():
        head = name.startswith("classifier") or "pooler" in name
        assert torch.equal(value, before[name]) != head, name


def test_l2_of_sgd_is_the_decay_of_sgd(tiny_model, rows):
    """λ/2 Σ w² and a weight decay of λ are one thing without moments, on the same weights."""
    one, other = tiny_model(), tiny_model()
    settings = SGD | {"epochs": 2, "learning_rate": 1e-2}
    finetune(one, rows, rows, **settings, l2=0.5)
    finetune(other, rows, rows, **(settings | {"weight_decay": 0.5}))
    others = other.network.state_dict()
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(value, others[name], atol=2e-6, rtol=1e-4)


def test_l1_makes_exact_zeros_that_are_declared_and_stay(tiny_model, rows, tmp_path):
    model = tiny_model()
    training = finetune(model, rows, rows, epochs=2, batch_size=8, learning_rate=3e-3, l1=1.0, precision="float32")
    assert 0.05 < training.facts["l1_sparsity"] < 0.95
    matrices = [matrix.parameter for matrix in model.anatomy.matrices]
    zeros = sum(int((parameter == 0).sum()) for parameter in matrices)
    assert zeros == training.facts["l1_zeros"]
    assert {id(parameter) for parameter in model.pruned} <= {id(parameter) for parameter in matrices}
    save_checkpoint(model, tmp_path / "model")
    again = load(tmp_path / "model")
    finetune(again, rows, rows, epochs=1, batch_size=8, learning_rate=3e-3)
    assert sum(int((matrix.parameter == 0).sum()) for matrix in again.anatomy.matrices) == zeros


def test_a_negative_strength_is_refused(tiny_model, rows):
    with pytest.raises(RecipeError, match=r"finetune\.l1: -1 can't be used"):
        finetune(tiny_model(), rows[:8], rows[:8], l1=-1)
