"""The forward pass sees the grid, the gradient passes straight through, and quantizing afterwards costs nothing."""

import importlib
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.finetune import evaluate_loss
from moss_rlhf.finetuning.options import QuantizationAware
from moss_rlhf.finetuning.quantization_aware import Rounding, round_activations
from moss_rlhf.finetuning.seen import see, straight_through
from moss_rlhf.model.grid import integer_grid, round_to_grid, round_to_int8
from moss_rlhf.optimization import prune, quantize
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32"}
GRID = integer_grid(3)


def _rounded(weight):
    return straight_through(weight, lambda value: round_to_grid(value, GRID))


@pytest.mark.parametrize("anew", [False, True], ids=["kept", "computed anew in backward"])
def test_gradients_are_those_of_the_rounded_network_with_respect_to_its_weights(anew):
    torch.manual_seed(0)
    module, inputs = nn.Linear(7, 5), torch.randn(11, 7, requires_grad=True)
    names = list(module.state_dict())
    handles = see(module, _rounded)
    outputs = checkpoint(module, inputs, use_reentrant=False) if anew else module(inputs)
    outputs.square().sum().backward()
    weight = round_to_grid(module._parameters["weight"].detach(), GRID).requires_grad_()
    given = inputs.detach().clone().requires_grad_()
    nn.functional.linear(given, weight, module.bias).square().sum().backward()
    assert not torch.equal(weight, module.weight)
    assert torch.equal(module.weight.grad, weight.grad)
    assert torch.equal(inputs.grad, given.grad)
    assert list(module.state_dict()) == names
    assert module.weight is module._parameters["weight"]
    for handle in handles:
        handle.remove()
    assert torch.equal(module(given), nn.functional.linear(given, module.weight, module.bias))


def test_an_error_in_the_forward_pass_leaves_the_parameter_in_its_place():
    module = nn.Linear(7, 5)
    see(module, _rounded)
    with pytest.raises(RuntimeError):
        module(torch.randn(3, 4))
    assert module.weight is module._parameters["weight"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "albert"])
def test_a_network_computes_as_if_it_were_quantized(family, tiny_model, rows_of):
    """Tables, tied heads, transposed matrices: the logits are those of the quantized network, bit for bit."""
    model, task = tiny_model(family), TASKS[tiny_model(family).task]
    data = encoded(model, rows_of(model.task)[:4])
    batch = task.collate([data[row] for row in range(4)], model.tokenizer)
    rounding = Rounding(model.network, QuantizationAware())
    rounding.before_step(0)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    seen = model.network(**task.inputs(model.network, batch)).logits
    with rounding.as_shipped():
        shipped = model.network(**task.inputs(model.network, batch)).logits
        kept = {name: value.clone() for name, value in model.network.state_dict().items()}
    rounding.leave()
    plain = model.network(**task.inputs(model.network, batch)).logits
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    quantize(model)
    assert torch.equal(seen, model.network(**task.inputs(model.network, batch)).logits)
    assert torch.equal(seen, shipped)
    assert not torch.equal(seen, plain)
    assert all(torch.equal(value, kept[name]) for name, value in model.network.state_dict().items())


def test_activations_by_hand():
    value = torch.tensor([[-1.0, 0.0, 0.3], [1.55, 0.005, -0.004]])  # 2.55 wide: steps of 0.01, zero at 100
    torch.testing.assert_close(round_activations(value, False), torch.tensor([[-1.0, 0.0, 0.3], [1.55, 0.0, 0.0]]))
    by_token = round_activations(torch.tensor([[1.27, 0.013], [12.7, 0.13]]), True)
    torch.testing.assert_close(by_token, torch.tensor([[1.27, 0.01], [12.7, 0.1]]))
    assert torch.equal(round_activations(torch.zeros(2, 3), False), torch.zeros(2, 3))


def test_quantizing_afterwards_changes_nothing_and_zeros_stay(tiny_model, rows):
    model = tiny_model()
    prune(model, sparsity=0.5)
    zeros = [parameter == 0 for parameter in model.pruned]
    training = finetune(model, rows, rows, quantization_aware={"scheme": "int8"}, **SETTINGS)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    measured = evaluate_loss(model, encoded(model, rows), TASKS[model.task])
    assert measured["loss"] == min(point["loss"] for point in training.history["validation"]
                                   if point["accuracy"] == training.facts["best_validation_accuracy"])  # fmt: skip
    assert all(bool((parameter == 0)[zero].all()) for parameter, zero in zip(model.pruned, zeros, strict=True))
    quantize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    weight = model.anatomy.matrices[0].weight
    assert torch.equal(weight, round_to_int8(weight))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.network.modules())


def test_it_loses_less_than_rounding_after_training(tiny_model, rows, monkeypatch):
    """A trained network, and 2 bits, where rounding hurts: as many further steps at the same rate, with and without."""
    for place in ("moss_rlhf.finetuning.quantization_aware", "moss_rlhf.optimization.quantize"):
        monkeypatch.setattr(importlib.import_module(place), "scheme_grid", lambda *_: integer_grid(2))
    trained = tiny_model()
    finetune(trained, rows, rows, **(SETTINGS | {"epochs": 10, "learning_rate": 5e-3}))
    losses = {}
    for name, options in {"after": {}, "aware": {"quantization_aware": {}}}.items():
        model = deepcopy(trained)
        finetune(model, rows, rows, **(SETTINGS | {"epochs": 4, "learning_rate": 1e-3}), **options)
        quantize(model)
        losses[name] = evaluate_loss(model, encoded(model, rows), TASKS[model.task])["loss"]
    assert losses["aware"] < 0.5 * losses["after"], losses


def test_groups_that_do_not_fill_a_row_are_refused(tiny_model, rows):
    with pytest.raises(ModelError, match="group_size 7 does not divide rows of 32"):
        finetune(tiny_model(), rows[:8], rows[:8], quantization_aware={"scheme": "int4", "group_size": 7})
    with pytest.raises(RecipeError, match="activations are rounded by int8 alone"):
        finetune(tiny_model(), rows[:8], rows[:8], quantization_aware={"scheme": "int4", "activations": True})


def test_gptq_finds_the_weights_on_the_grid(tiny_model, rows):
    model = tiny_model()
    finetune(model, rows, rows, quantization_aware={"scheme": "int4", "group_size": 16}, **SETTINGS)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    quantize(model, rows, scheme="int4", method="gptq", group_size=16)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
