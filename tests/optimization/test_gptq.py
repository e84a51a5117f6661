import pytest
import torch

from moss_rlhf.model.grid import (
    INT8,
    dequantize,
    grid_codes,
    grid_parameters,
    integer_grid,
    round_to_grid,
    round_to_int8,
)
from moss_rlhf.optimization.factor import factorize
from moss_rlhf.optimization.fallbacks import shortage
from moss_rlhf.optimization.gptq import gptq, output_error, round_by_gptq


def layer(out_features, width, seed, tokens=None, spread=0.5):
    """A random weight and the gram of correlated inputs, whose energy falls off as (1 + i)^-spread."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 2 * width if tokens is None else tokens
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1) ** -spread
    inputs = torch.randn(tokens, width, generator=generator) @ mix.T
    return torch.randn(out_features, width, generator=generator), inputs.T @ inputs


def published(weight, hessian, bits, group_size=None, *, damping=0.01, fit=None):
    """Algorithm 1 of arXiv:2210.17323 with blocks of one column, in float64, as its reference code reads it.

    Scales in full precision, or from `fit`, which gives (scale, zero) of the columns of one group.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    width, highest = weight.shape[1], 2**bits - 1
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    rounded = torch.zeros_like(weight)
    for column in range(width):
        if column % (group_size or width) == 0:
            group = weight[:, column : column + (group_size or width)]
            if fit is None:
                least, most = group.amin(dim=1).clamp_max(0), group.amax(dim=1).clamp_min(0)
                scale = (most - least) / highest
                zero = (-least / scale).round()
            else:
                scale, zero = fit(group)
        code = ((weight[:, column] / scale).round() + zero).clamp(0, highest)
        rounded[:, column] = (code - zero) * scale
        error = (weight[:, column] - rounded[:, column]) / inverse[column, column]
        weight[:, column:] -= error[:, None] * inverse[column, column:]
    return rounded.float()


@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (4, 32), (3, 96), (8, None), (2, 192)])
def test_the_output_error_is_the_published_algorithms_and_below_rounding(bits, group_size, spread):
    """Within 1 % over the layers; of one layer in 2 bits, a single tie that falls the other way can make 2 %."""
    ratios = []
    for seed in range(5):
        weight, hessian = layer(128, 384, seed, spread=spread)
        ours, _, _ = gptq(weight, hessian, bits, group_size)
        reference = published(weight, hessian, bits, group_size)
        nearest = round_to_grid(weight, integer_grid(bits, group_size, symmetric=False))
        errors = [output_error(weight - rounded, hessian) for rounded in (ours, reference, nearest)]
        assert errors[0] < errors[2]
        ratios.append(errors[0] / errors[1])
    assert max(ratios) <= 1.05
    assert sum(ratios) / len(ratios) <= 1.01


@pytest.mark.parametrize(
    ("out_features", "width", "group_size"),
    [(1, 1, None), (1, 31, None), (7, 1, 1), (5, 37, None), (3, 131, 131), (11, 133, 7), (2, 260, 130), (6, 261, 87)],
)
def test_on_the_same_scales_the_codes_are_the_published_algorithms(out_features, width, group_size):
    """Widths that fall across blocks and panels. Ties in float32 aside, every code is the same."""
    weight, hessian = layer(out_features, width, 3)
    grid = integer_grid(4, group_size, symmetric=False)

    def fit(group):
        scale, zero = grid_parameters(group.float(), integer_grid(4, symmetric=False))
        return scale[:, 0].double(), zero[:, 0].double()

    ours = round_by_gptq(weight, hessian, grid)
    reference = published(weight, hessian, 4, group_size, fit=fit)
    same = (ours.weight - reference).abs() < 1e-5
    assert same.float().mean() >= (1.0 if width < 100 else 0.97)  # one tie moves what comes after it in its row
    errors = [output_error(weight - rounded, hessian) for rounded in (ours.weight, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_beats_rounding_to_nearest(seed, bits, symmetric):
    weight, hessian = layer(24, 64, seed)
    nearest = round_to_grid(weight, integer_grid(bits, 16, symmetric=symmetric))
    for activation_order in (False, True):
        ours, _, _ = gptq(weight, hessian, bits, 16, symmetric=symmetric, activation_order=activation_order)
        assert output_error(weight - ours, hessian) < output_error(weight - nearest, hessian)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("grid", [integer_grid(4, 16), integer_grid(3, symmetric=False), INT8], ids=str)
def test_inputs_that_are_independent_leave_rounding_to_nearest(grid, activation_order):
    weight, _ = layer(17, 144, 0)
    for hessian in (torch.eye(144), torch.diag(torch.rand(144, generator=torch.Generator().manual_seed(1)) + 0.1)):
        found = round_by_gptq(weight, hessian, grid, activation_order=activation_order)
        assert torch.equal(found.weight, round_to_grid(weight, grid))
        assert torch.equal(found.scale, grid_parameters(weight, grid)[0])
        assert torch.equal(found.zero, grid_parameters(weight, grid)[1])


@pytest.mark.parametrize("group_size", [None, 20])
def test_activation_order_that_moves_nothing_changes_nothing(group_size):
    weight, hessian = layer(9, 140, 2)
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]  # descending already
    grid = integer_grid(4, group_size, symmetric=False)
    plain = round_by_gptq(weight, hessian, grid, static_groups=True)
    ordered = round_by_gptq(weight, hessian, grid, activation_order=True)
    assert torch.equal(plain.weight, ordered.weight)
    assert torch.equal(plain.scale, ordered.scale)


def test_activation_order_is_the_plain_walk_over_permuted_columns():
    weight, hessian = layer(9, 140, 2)
    order = hessian.diagonal().argsort(descending=True)
    permuted = round_by_gptq(weight[:, order], hessian[order][:, order], integer_grid(4, symmetric=False))
    ordered = round_by_gptq(weight, hessian, integer_grid(4, symmetric=False), activation_order=True)
    assert torch.equal(permuted.weight, ordered.weight[:, order])


@pytest.mark.parametrize("options", [{}, {"activation_order": True}, {"static_groups": True}])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_weight_lies_on_the_grid_that_is_returned(symmetric, options):
    weight, hessian = layer(13, 120, 4)
    grid = integer_grid(4, 24, symmetric=symmetric)
    found = round_by_gptq(weight, hessian, grid, **options)
    assert found.scale.shape == found.zero.shape == (13, 5)
    codes = grid_codes(found.weight, found.scale, found.zero, grid)
    assert torch.equal(dequantize(codes, found.scale, found.zero), found.weight)
    steps = found.weight / found.scale.repeat_interleave(24, dim=1)
    assert torch.equal(steps, steps.round())


@pytest.mark.parametrize("options", [{}, {"activation_order": True}])
@pytest.mark.parametrize("grid", [INT8, integer_grid(8), integer_grid(4, 40), integer_grid(2, 40)], ids=str)
def test_keep_largest_lets_the_weight_tell_its_scale(grid, options):
    weight, hessian = layer(64, 120, 5)
    weight[3] = 0
    kept = round_by_gptq(weight, hessian, grid, keep_largest=True, **options)
    scale, zero = grid_parameters(kept.weight, grid)
    assert torch.equal(scale, kept.scale)
    assert torch.equal(round_to_grid(kept.weight, grid), kept.weight)
    assert torch.equal(dequantize(grid_codes(kept.weight, scale, zero, grid), scale, zero), kept.weight)
    assert (kept.weight[3] == 0).all()
    if grid.group_size is None:  # small groups of coarse codes mostly reach their ends by themselves
        free = round_by_gptq(weight, hessian, grid, **options)
        assert not torch.equal(grid_parameters(free.weight, grid)[0], free.scale)
    assert output_error(weight - kept.weight, hessian) < output_error(weight - round_to_grid(weight, grid), hessian)


def test_gptq_onto_int8_is_a_fixed_point_of_what_the_export_does():
    weight, hessian = layer(32, 96, 6)
    found = round_by_gptq(weight, hessian, INT8, keep_largest=True)
    assert torch.equal(round_to_int8(found.weight), found.weight)
    assert output_error(weight - found.weight, hessian) < 0.8 * output_error(weight - round_to_int8(weight), hessian)


@pytest.mark.parametrize("options", [{}, {"activation_order": True}, {"keep_largest": True}])
def test_pruned_weights_are_zero_and_the_others_make_up_for_them(options):
    weight, hessian = layer(20, 90, 7)
    pruned = torch.rand(20, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    grid = integer_grid(4, 30)
    found = round_by_gptq(weight, hessian, grid, pruned=pruned, **options)
    assert (found.weight[pruned] == 0).all()
    assert (found.weight[~pruned] != 0).any()
    plain = round_to_grid(weight.masked_fill(pruned, 0), grid)
    assert output_error(weight - found.weight, hessian) < 0.8 * output_error(weight - plain, hessian)


def swept(weight, hessian, found, grid, damping=0.01):
    """One sweep of arXiv:2309.01885, algorithm 1, in float64, column by column; found: the Solution before it."""
    hessian = hessian.double() / hessian.diagonal().double().mean()
    hessian.diagonal().add_(damping)
    weight, rounded = weight.double(), found.weight.double()
    width = grid.group_width(weight.shape[1])
    for column in range(weight.shape[1]):
        scale, zero = found.scale[:, column // width].double(), found.zero[:, column // width]
        pull = (weight - rounded) @ hessian[:, column] / hessian[column, column]
        steps = ((rounded[:, column] + pull) / scale).round()
        rounded[:, column] = steps.clamp(grid.lowest - zero, grid.highest - zero) * scale
    return rounded.float()


@pytest.mark.parametrize("grid", [integer_grid(4, 50), integer_grid(3, 30, symmetric=False), INT8], ids=str)
def test_a_sweep_is_the_published_coordinate_descent(grid):
    weight, hessian = layer(12, 300, 15)
    before = round_by_gptq(weight, hessian, grid)
    after = round_by_gptq(weight, hessian, grid, sweeps=1)
    assert torch.equal(before.scale, after.scale)
    same = (after.weight - swept(weight, hessian, before, grid)).abs() < 1e-5
    assert same.float().mean() >= 0.995  # ties in float32


@pytest.mark.parametrize("options", [{}, {"activation_order": True}, {"keep_largest": True}, {"clip": True}])
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_no_sweep_raises_the_error_and_what_is_left_can_not_be_bettered_by_one_code(options, spread):
    weight, hessian = layer(9, 140, 16, spread=spread)
    grid = integer_grid(3, 20)
    damped = hessian / hessian.diagonal().mean() + 0.01 * torch.eye(140)
    found = [round_by_gptq(weight, hessian, grid, sweeps=count, **options) for count in (0, 1, 2, 60)]
    errors = [output_error(weight - each.weight, damped) for each in found]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.98 * errors[0]
    rounded, scales = found[-1].weight, found[-1].scale.repeat_interleave(20, dim=1)
    pull = (weight - rounded) @ damped / damped.diagonal()
    wanted = ((rounded + pull) / scales).round().clamp(grid.lowest, grid.highest)
    free = torch.ones_like(wanted, dtype=torch.bool)
    if "keep_largest" in options:  # those codes are held
        free = (rounded / scales).round().abs() < grid.highest
    assert torch.equal(wanted[free], (rounded / scales).round()[free])


def test_pruned_weights_stay_zero_in_sweeps():
    weight, hessian = layer(20, 90, 7)
    pruned = torch.rand(20, 90, generator=torch.Generator().manual_seed(0)) < 0.5
    found = round_by_gptq(weight, hessian, integer_grid(4, 30), pruned=pruned, clip=True, sweeps=2)
    assert (found.weight[pruned] == 0).all()


def test_a_scale_clips_where_that_rounds_the_other_columns_better():
    """Codes −1, 0, 1 of one group: 1.0 alone reaches the end, and fifteen columns want 0.75.

    0.75 changes the first column alone, by 0.25: 0.0625 in squares. 0.8: 0.04 + 15 · 0.0025 = 0.0775; 1: 15 · 0.0625.
    """
    weight = torch.tensor([[1.0] + 15 * [0.75], 16 * [1.0]])
    found = round_by_gptq(weight, torch.eye(16), integer_grid(2, 16), clip=True)
    assert found.scale.flatten().tolist() == pytest.approx([0.75, 1.0], rel=1e-4)
    assert found.weight[0].tolist() == pytest.approx(16 * [0.75], rel=1e-4)
    heavy = torch.diag(torch.tensor([1000.0] + 15 * [1.0]))  # the first column carries nearly all of the energy
    kept = round_by_gptq(weight, heavy, integer_grid(2, 16), clip=True)
    assert kept.scale.flatten().tolist() == pytest.approx([1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("grid", [integer_grid(4, 40, scale_bits=8), INT8], ids=str)
def test_clipped_scales_still_follow_from_the_weights(grid):
    weight, hessian = layer(64, 120, 5)
    found = round_by_gptq(weight, hessian, grid, keep_largest=True, clip=True, sweeps=3)
    assert torch.equal(grid_parameters(found.weight, grid)[0], found.scale)
    assert torch.equal(round_to_grid(found.weight, grid), found.weight)
    plain = round_by_gptq(weight, hessian, grid, keep_largest=True)
    assert output_error(weight - found.weight, hessian) < 0.95 * output_error(weight - plain.weight, hessian)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (6, 7)])
def test_the_inputs_are_untouched(shape):
    weight, hessian = layer(*shape, 8)
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian, 3)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_no_common_scale_of_the_hessian_matters():
    weight, hessian = layer(10, 50, 9)
    first, _, _ = gptq(weight, hessian, 4, 10)
    for scale in (2.0**-60, 2.0**50):
        assert torch.equal(gptq(weight, hessian * scale, 4, 10)[0], first)
    assert output_error(first - gptq(weight, hessian / 3000, 4, 10)[0], hessian) <= 0.1 * output_error(first, hessian)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype):
    weight, hessian = layer(6, 40, 10)
    found, scale, zero = gptq(weight.to(dtype), hessian.double(), 4, 8)
    assert found.dtype == scale.dtype == torch.float32
    assert zero.dtype == torch.int32
    assert torch.equal(found, gptq(weight.to(dtype).float(), hessian.double(), 4, 8)[0])


def test_factorize_gives_the_factor_of_the_damped_hessian():
    _, hessian = layer(1, 40, 11)
    hessian = hessian / hessian.diagonal().mean()
    found = factorize(hessian, 0.01)
    factor, used = found.upper, found.damping
    damped = (hessian + 0.01 * torch.eye(40)).double()
    rest = torch.linalg.solve(factor.double(), damped)
    middle = torch.linalg.solve(factor.double(), rest.T)  # U⁻¹ H U⁻ᵀ = D
    assert used == 0.01
    assert torch.equal(factor.tril(), torch.eye(40))
    assert (middle - torch.diag(middle.diagonal())).abs().max() < 1e-4
    assert (middle.diagonal() > 0).all()


@pytest.mark.parametrize("tokens", [1, 5, 63])
def test_too_few_tokens_are_damped_and_named(tokens):
    weight, hessian = layer(24, 64, 12, tokens=tokens)
    found = round_by_gptq(weight, hessian, integer_grid(4, 16, symmetric=False))
    nearest = round_to_grid(weight, integer_grid(4, 16, symmetric=False))
    assert output_error(weight - found.weight, hessian) < output_error(weight - nearest, hessian)
    assert f"{tokens} calibration tokens span at most {tokens} of 64" in shortage(tokens, 64)
    assert shortage(64, 64) is None


def test_damping_recovers_by_itself_and_says_so():
    weight, _ = layer(4, 6, 13)
    hessian = torch.ones(6, 6)  # rank 1, and 0 is asked for
    assert round_by_gptq(weight, hessian, INT8, damping=0.0).damping >= 1e-6
    hessian = torch.eye(4) + 0.3 * (torch.eye(4) - torch.ones(4, 4)) * 1.2  # lowest eigenvalue 1 − 3 · 0.36 < 0
    found = round_by_gptq(weight[:, :4], hessian, INT8, damping=0.01)
    assert found.damping == pytest.approx(0.1)
    assert found.weight.isfinite().all()


def test_dead_features_are_rounded_to_nearest_and_counted():
    weight, hessian = layer(8, 40, 14)
    hessian[:, 3:9] = 0
    hessian[3:9] = 0
    found = round_by_gptq(weight, hessian, integer_grid(4, symmetric=False))
    assert found.dead == 6
    nearest = round_to_grid(weight, integer_grid(4, symmetric=False))
    assert torch.equal(found.weight[:, 3:9], nearest[:, 3:9])
    assert torch.equal(round_by_gptq(weight, torch.zeros(40, 40), integer_grid(4, symmetric=False)).weight, nearest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.full((2, 8), float("nan"))}, "weight is not finite"),
        ({"weight": torch.full((2, 8), float("inf"))}, "weight is not finite"),
        ({"weight": torch.ones(8)}, r"weight must be \(out, in\)"),
        ({"weight": torch.ones(0, 8)}, r"weight must be \(out, in\)"),
        ({"hessian": torch.full((8, 8), float("nan"))}, "hessian is not finite"),
        ({"hessian": torch.diag(torch.tensor([1.0] * 7 + [float("inf")]))}, "hessian is not finite"),
        ({"hessian": torch.eye(7)}, r"hessian must be \(8, 8\), got \(7, 7\)"),
        ({"hessian": -torch.eye(8)}, "no gram matrix"),
        ({"hessian": torch.eye(8) + torch.ones(8, 8).triu(1)}, "no gram matrix"),
        ({"hessian": torch.eye(8) - 40 * torch.eye(8).flip(0)}, "not positive semi-definite"),
        ({"damping": -0.1}, "damping must be in"),
        ({"damping": float("nan")}, "damping must be in"),
        ({"group_size": 128}, "group_size 128 does not divide rows of 8 weights"),
        ({"bits": 1}, "bits must be 2 to 8"),
        ({"bits": 9}, "bits must be 2 to 8"),
    ],
)
def test_bad_input(change, message):
    arguments = {"weight": torch.ones(2, 8), "hessian": torch.eye(8), "bits": 4, "group_size": 4} | change
    with pytest.raises(ValueError, match=message):
        gptq(**arguments)


def test_options_that_do_not_fit():
    with pytest.raises(ValueError, match="keep_largest needs a symmetric grid"):
        round_by_gptq(torch.ones(2, 8), torch.eye(8), integer_grid(4, symmetric=False), keep_largest=True)
    with pytest.raises(ValueError, match=r"pruned must be \(2, 8\), got \(2, 7\)"):
        round_by_gptq(torch.ones(2, 8), torch.eye(8), INT8, pruned=torch.zeros(2, 7, dtype=torch.bool))
