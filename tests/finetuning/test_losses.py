"""Losses against their closed forms in float64, their gradients by hand, and what a training makes of them."""

import numpy as np
import pytest
import torch

from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.losses import class_weights, cross_entropy, disagreement, label_loss, mean_squared_error
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.finetuning.options import Loss
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

RANDOM = np.random.default_rng(5)
Z, OTHER = RANDOM.normal(size=(7, 3)) * 2, RANDOM.normal(size=(7, 3)) * 2
Y = np.array([0, 2, 1, 1, 0, 2, 2])
WEIGHTS = np.array([0.5, 2.0, 1.25])


def _softmax(z):
    exponentials = np.exp(z - z.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


P = _softmax(Z)


def _asked(smoothing):
    return (1 - smoothing) * np.eye(3)[Y] + smoothing / 3


def _value_and_gradient(loss, **options):
    z = torch.tensor(Z, dtype=torch.float32, requires_grad=True)
    value = loss(z, torch.tensor(Y), **options)
    value.backward()
    assert z.grad is not None
    return value.item(), z.grad.numpy()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_and_its_gradient_are_the_textbooks(smoothing, weights):
    q, w = _asked(smoothing), np.ones(7) if weights is None else weights[Y]
    given = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    value, gradient = _value_and_gradient(cross_entropy, label_smoothing=smoothing, weights=given)
    assert value == pytest.approx((w * -(q * np.log(P)).sum(axis=1)).mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, w[:, None] * (P - q) / 7, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_loss_and_its_gradient_by_hand(gamma):
    """Lin et al., appendix: dFL/dz_j = ((1 − p_y)^γ − γ p_y (1 − p_y)^(γ−1) log p_y) · (p_j − [j = y])."""
    p = P[np.arange(7), Y]
    value, gradient = _value_and_gradient(cross_entropy, gamma=gamma)
    assert value == pytest.approx(((1 - p) ** gamma * -np.log(p)).mean(), rel=1e-5)
    share = (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * np.log(p)
    np.testing.assert_allclose(gradient, share[:, None] * (P - np.eye(3)[Y]) / 7, atol=1e-6)


def test_focal_loss_of_a_sure_answer_has_a_finite_gradient():
    z = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    cross_entropy(z, torch.tensor([0]), gamma=0.5).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_mean_squared_error_and_its_gradient_by_hand(smoothing):
    away = P - _asked(smoothing)
    value, gradient = _value_and_gradient(mean_squared_error, label_smoothing=smoothing)
    assert value == pytest.approx((away**2).sum(axis=1).mean(), rel=1e-5)
    expected = 2 * P * (away - (P * away).sum(axis=1, keepdims=True)) / 7
    np.testing.assert_allclose(gradient, expected, atol=1e-7)


def test_disagreement_is_both_divergences():
    q = _softmax(OTHER)
    expected = 0.5 * ((P * np.log(P / q)).sum(axis=1) + (q * np.log(q / P)).sum(axis=1)).mean()
    assert float(disagreement(torch.tensor(Z), torch.tensor(OTHER))) == pytest.approx(expected, rel=1e-5)
    assert float(disagreement(torch.tensor(Z), torch.tensor(Z + 3))) == pytest.approx(0, abs=1e-6)


def test_balanced_weights_give_every_class_the_same_say_and_have_mean_one():
    labels = [0] * 6 + [1] * 3 + [2] * 1
    weights = class_weights("balanced", "abc", labels)
    torch.testing.assert_close(weights, torch.tensor([10 / 18, 10 / 9, 10 / 3]))
    given = class_weights({"b": 4}, "abc", labels)
    torch.testing.assert_close(given / given[0], torch.tensor([1.0, 4.0, 1.0]))
    assert float(given[labels].mean()) == pytest.approx(1)


def test_a_batch_is_the_mean_of_its_rows():
    loss = label_loss(TASKS["text-classification"], Loss(class_weights={"a": 3}, gamma=2), "abc", Y)
    z, y = torch.tensor(Z, dtype=torch.float32), torch.tensor(Y)
    each = torch.stack([loss(z[row : row + 1], y[row : row + 1]) for row in range(7)])
    torch.testing.assert_close(loss(z, y), each.mean())


def test_a_language_models_smoothed_loss_counts_the_targets_alone(tiny_model, rows_of):
    model = tiny_model("gpt2")
    task = TASKS["text-generation"]
    data = encoded(model, rows_of("text-generation")[:4])
    batch = task.collate([data[row] for row in range(4)], model.tokenizer)
    logits = model.network(**task.inputs(model.network, batch)).logits
    own = task.loss(logits, batch["labels"])
    torch.testing.assert_close(label_loss(task, Loss(), (), ())(logits, batch["labels"]), own)
    inside = batch["labels"][:, 1:] != -100
    log_p = logits[:, :-1][inside].log_softmax(-1)
    expected = 0.9 * own - 0.1 * log_p.mean()
    torch.testing.assert_close(label_loss(task, Loss(label_smoothing=0.1), (), ())(logits, batch["labels"]), expected)


def test_r_drop_passes_twice_and_asks_for_agreement(tiny_model, rows):
    model, task = tiny_model(), TASKS["text-classification"]
    data = encoded(model, rows[:6])
    batch = task.collate([data[row] for row in range(6)], model.tokenizer)
    objective = Objective(task, labelled=label_loss(task, Loss(r_drop=3.0), model.labels, data["labels"]))
    model.network.train()
    torch.manual_seed(1)
    found = objective(model.network, batch)
    torch.manual_seed(1)
    first, second = (model.network(**task.inputs(model.network, batch)).logits for _ in range(2))
    assert not torch.equal(first, second)
    plain = (task.loss(first, batch["labels"]) + task.loss(second, batch["labels"])) / 2
    torch.testing.assert_close(found, plain + 1.5 * disagreement(first, second))
    assert objective.passes == 2


@pytest.mark.parametrize(
    "loss",
    [
        {"label_smoothing": 0.1, "r_drop": 1.0},
        {"gamma": 1.0, "class_weights": "balanced"},
        {"kind": "mean_squared_error"},
    ],
)
def test_every_loss_learns(tiny_model, rows, loss):
    uneven = rows + rows[:30:2]
    settings = {"epochs": 8, "learning_rate": 3e-3, "batch_size": 8, "precision": "float32"}
    training = finetune(tiny_model(), uneven, rows, loss=loss, **settings)
    assert training.facts["best_validation_accuracy"] > 0.8


def test_r_drop_goes_with_a_teacher(tiny_model, rows):
    settings = {"epochs": 1, "batch_size": 8, "loss": {"r_drop": 1.0}, "precision": "float32"}
    assert finetune(tiny_model(blocks=2), rows[:16], rows[:8], teacher=tiny_model(), **settings).flops > 0


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"class_weights": {"positiv": 2}}, "no label 'positiv'; did you mean 'positive'"),
        ({"label_smoothing": 1.0}, "label_smoothing: 1.0 can't be used"),
        ({"gamma": 1.0, "kind": "mean_squared_error"}, "gamma is the focal loss's"),
        ({"kind": "hinge"}, "'hinge' can't be used; it must be 'cross_entropy' or 'mean_squared_error'"),
        ({"class_weights": {"positive": 0}}, "class_weights.positive: 0 can't be used"),
    ],
)
def test_what_can_not_be_asked_for_is_refused(tiny_model, rows, loss, words):
    with pytest.raises(RecipeError, match=words):
        finetune(tiny_model(), rows[:8], rows[:8], loss=loss)


def test_a_language_model_has_no_classes_to_weigh(tiny_model, rows_of):
    texts = rows_of("text-generation")[:8]
    with pytest.raises(RecipeError, match=r"loss\.gamma: text-generation foretells tokens"):
        finetune(tiny_model("gpt2"), texts, texts, loss={"gamma": 2.0})
    with pytest.raises(ModelError, match="no dropout"):
        finetune(tiny_model("llama"), texts, texts, loss={"r_drop": 1.0})
