"""Each optimizer's step by hand, and the plateau's rates."""

import pytest
import torch

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.optimizers import make_optimizer
from moss_rlhf.finetuning.options import Optimizer

RATE, DECAY = 0.1, 0.5


def _step(options, gradient, weight=2.0, steps=1):
    parameter = torch.nn.Parameter(torch.tensor([weight]))
    optimizer = make_optimizer(options, [{"params": [parameter], "lr": RATE, "weight_decay": DECAY}])
    for _ in range(steps):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    return parameter.item()


def test_the_decay_of_adamw_is_decoupled_and_that_of_adam_is_not():
    """The first step of either is η · g / |g|; adamw decays beside it, in adam the decay vanishes in the sign."""
    assert _step(Optimizer("adamw"), 4.0) == pytest.approx(2 - RATE * DECAY * 2 - RATE)
    assert _step(Optimizer("adam"), 4.0) == pytest.approx(2 - RATE)
    assert _step(Optimizer("adam"), -0.5) == pytest.approx(2 - RATE)  # g + λ w = −0.5 + 1 > 0


def test_sgd_with_momentum_by_hand():
    first = 2 - RATE * (4 + DECAY * 2)
    momentum = 0.9 * (4 + DECAY * 2) + (4 + DECAY * first)
    assert _step(Optimizer("sgd"), 4.0, steps=2) == pytest.approx(first - RATE * momentum)
    assert _step(Optimizer("sgd", momentum=0.0), 4.0) == pytest.approx(first)


def test_adafactor_by_hand():
    """The first step: v = g², the update g / √v has a root mean square of 1, and the decay is decoupled."""
    assert _step(Optimizer("adafactor"), 4.0) == pytest.approx(2 - RATE * DECAY * 2 - RATE)


def test_betas_and_epsilon_are_used():
    # m̂ = g, v̂ = g² at the first step whatever the betas: a large ε shows
    assert _step(Optimizer("adam", epsilon=3.0), 3.0, weight=0.0) == pytest.approx(-RATE / 2)
    # β₁ = 0: the second step has the momentum of its own gradient alone, β₂ = 0: and its own square
    assert _step(Optimizer("adam", betas=(0.0, 0.0)), 3.0, weight=0.0, steps=1) == pytest.approx(-RATE)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ("adan", "'adan' can't be used; it must be 'adamw', 'adam', "),
        ({"name": "adamw", "momentum": 0.9}, "momentum: is for sgd, not adamw"),
        ({"name": "sgd", "betas": (0.9, 0.99)}, "betas: is for adamw and adam, not sgd"),
        ({"name": "sgd", "momentum": 1.0}, "1.0 can't be used"),
        ({"name": "sgd", "nesterov": True}, "unknown field 'nesterov'"),
    ],
)
def test_what_an_optimizer_does_not_have_is_refused(tiny_model, rows, optimizer, words):
    with pytest.raises(RecipeError, match=words):
        finetune(tiny_model(), rows[:8], rows[:8], optimizer=optimizer)


@pytest.mark.parametrize(("optimizer", "rate"), [("adam", 3e-3), ("sgd", 0.03), ("adafactor", 5e-3)])
def test_each_learns(tiny_model, rows, optimizer, rate):
    training = finetune(
        tiny_model(), rows, rows, epochs=16, batch_size=8, learning_rate=rate, optimizer=optimizer, precision="float32"
    )
    assert training.facts["best_validation_accuracy"] > 0.8


def test_rates_fall_where_nothing_gets_better(tiny_model, rows):
    """Nothing moves, so every evaluation after the first brings nothing: the rate halves after each from the second.

    An evaluation after step s is known to the step after the next.
    """
    schedule = {"name": "reduce_on_plateau", "factor": 0.5, "patience": 1}
    model = tiny_model()
    training = finetune(
        model, rows[:32], rows, epochs=4, batch_size=16, learning_rate=1e-12, warmup=0.0, schedule=schedule,
        precision="float32", weight_decay=0.0, optimizer="adafactor",
    )  # fmt: skip
    rates = {point["step"]: point["learning_rate"] for point in training.history["train"]}
    accuracies = {point["accuracy"] for point in training.history["validation"]}
    assert len(accuracies) == 1
    assert rates == pytest.approx({step: 1e-12 * 0.5 ** max(0, (step - 4) // 2) for step in range(1, 9)}, rel=1e-6)
