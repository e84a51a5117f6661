import pytest
import torch

from moss_rlhf.model.grid import INT8, integer_grid, round_to_grid
from moss_rlhf.optimization.awq import awq_scales


def layer(out_features, width, seed, outliers=4):
    """A weight and inputs of which a few features are thirty times larger."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.ones(width)
    size[torch.randperm(width, generator=generator)[:outliers]] = 30.0
    inputs = torch.randn(300, width, generator=generator) * size
    return torch.randn(out_features, width, generator=generator), inputs


def measured(weight, inputs, scales, grid):
    """‖(W − Q(W · s) / s) X‖² from the activations themselves, in float64."""
    rounded = round_to_grid(weight * scales, grid).double() / scales.double()
    return float(((weight.double() - rounded) @ inputs.T.double()).pow(2).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("grid", [integer_grid(4, 16), integer_grid(3, 32, symmetric=False), INT8], ids=str)
def test_errors_are_those_of_the_activations_and_the_best_of_all_exponents(seed, grid):
    weight, inputs = layer(23, 96, seed)
    magnitude = inputs.abs().mean(dim=0)
    found = awq_scales(weight, inputs.T @ inputs, magnitude, grid, points=10)
    assert found.plain == pytest.approx(measured(weight, inputs, torch.ones(96), grid), rel=1e-3)
    assert found.error == pytest.approx(measured(weight, inputs, found.scales, grid), rel=1e-3)
    for step in range(11):
        scales = magnitude ** (step / 10)
        scales = scales / (scales.max() * scales.min()).sqrt()
        assert found.error <= measured(weight, inputs, scales, grid) * (1 + 1e-3)
        if step / 10 == found.exponent:
            torch.testing.assert_close(found.scales, scales)


@pytest.mark.parametrize("seed", range(8))
def test_outliers_are_worth_a_scale_and_even_inputs_cost_nothing(seed):
    grid = integer_grid(4, 16)
    weight, inputs = layer(23, 96, seed)
    found = awq_scales(weight, inputs.T @ inputs, inputs.abs().mean(dim=0), grid)
    assert found.exponent > 0
    assert found.error < 0.5 * found.plain
    even = awq_scales(weight, torch.eye(96), torch.ones(96), grid)
    assert (even.exponent, even.error) == (0.0, even.plain)  # the tie goes to the lower exponent
    assert torch.equal(even.scales, torch.ones(96))


def test_it_is_never_worse_than_rounding_to_nearest():
    for seed in range(20):
        weight, inputs = layer(5, 24, seed, outliers=seed % 3)
        found = awq_scales(weight, inputs.T @ inputs, inputs.pow(2).mean(dim=0).sqrt(), integer_grid(2, 8))
        assert found.error <= found.plain


def test_neither_a_common_scale_of_the_activations_nor_a_dead_feature_matters():
    weight, inputs = layer(6, 32, 1)
    inputs[:, 5] = 0
    gram, magnitude = inputs.T @ inputs, inputs.abs().mean(dim=0)
    first = awq_scales(weight, gram, magnitude, integer_grid(4, 8))
    assert first.scales.isfinite().all()
    assert (first.scales > 0).all()
    assert torch.equal(awq_scales(weight, gram, magnitude * 2.0**40, integer_grid(4, 8)).scales, first.scales)
    assert awq_scales(weight, torch.zeros(32, 32), torch.zeros(32), integer_grid(4, 8)).exponent == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(8)}, r"weight must be \(out, in\)"),
        ({"weight": torch.full((2, 8), float("nan"))}, "weight is not finite"),
        ({"gram": torch.eye(7)}, r"gram must be \(8, 8\)"),
        ({"gram": torch.full((8, 8), float("inf"))}, "gram and activation must be finite"),
        ({"activation": torch.ones(7)}, r"activation \(8,\), got \(8, 8\) and \(7,\)"),
        ({"activation": -torch.ones(8)}, "activation >= 0"),
        ({"points": 0}, "points must be at least 1"),
        ({"grid": integer_grid(4, 128)}, "group_size 128 does not divide rows of 8"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weight": torch.ones(2, 8), "gram": torch.eye(8), "activation": torch.ones(8), "grid": INT8} | change
    with pytest.raises(ValueError, match=message):
        awq_scales(**arguments)
