import pytest
import torch

from moss_rlhf.model.grid import INT8, grid_parameters, integer_grid
from moss_rlhf.optimization.factor import factorize
from moss_rlhf.optimization.gptq import output_error, round_by_gptq
from moss_rlhf.optimization.magnitude import magnitude_mask
from moss_rlhf.optimization.patterns import Pattern, all_but_highest, lowest_blocks
from moss_rlhf.optimization.sparsegpt import prune_by_sparsegpt, sparsegpt
from moss_rlhf.optimization.wanda import wanda_mask, wanda_mask_n_of_m

TWO_OF_FOUR = Pattern(keep=(2, 4))
SHAPES = [(64, 256), (97, 131), (7, 37), (31, 389), (5, 1), (1, 300), (200, 130)]


def layer(out_features, width, seed, tokens=None, spread=0.5):
    """A random weight and the gram of correlated inputs, whose energy falls off as (1 + i)^-spread."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1) ** -spread
    inputs = torch.randn(tokens or 2 * width, width, generator=generator) @ mix.T
    return torch.randn(out_features, width, generator=generator), inputs.T @ inputs


def published(weight, hessian, sparsity, keep=None, quantize=None):
    """Algorithm 1 of arXiv:2301.00774 in float64, blocks and masks of 128 columns, with §3.3's n:m and §3.4's rounding.

    quantize(values, column) rounds one column. The lowest share of every block goes, exactly and rounded so that the
    whole matrix loses its share rounded down; the pseudo-code leaves the rounding open.
    """
    weight, hessian = weight.double().clone(), hessian.double().clone()
    out_features, width = weight.shape
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for begin in range(0, width, 128):
        end = min(begin + 128, width)
        errors = torch.zeros(out_features, end - begin, dtype=torch.float64)
        for column in range(begin, end):
            step = keep[1] if keep else 128
            if (column - begin) % step == 0:
                here = slice(column, min(column + step, width))
                cost = weight[:, here] ** 2 / inverse.diagonal()[here] ** 2
                if keep:
                    mask[:, here] = all_but_highest(cost, *keep)
                else:
                    removed = int(out_features * end * sparsity) - int(out_features * begin * sparsity)
                    chosen = torch.zeros(cost.numel(), dtype=torch.bool)
                    chosen[cost.flatten().argsort(stable=True)[:removed]] = True
                    mask[:, here] = chosen.reshape(cost.shape)
            new = weight[:, column].clone()
            new = quantize(new, column) if quantize else new
            new[mask[:, column]] = 0
            error = (weight[:, column] - new) / inverse[column, column]
            weight[:, column:end] -= error[:, None] * inverse[column, column:end]
            weight[:, column], errors[:, column - begin] = new, error
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return weight.float()


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("spread", [0.0, 1.0])
@pytest.mark.parametrize(("out_features", "width"), SHAPES)
def test_the_output_error_is_the_published_algorithms(out_features, width, spread, sparsity):
    weight, hessian = layer(out_features, width, 0, spread=spread)
    before = weight.clone(), hessian.clone()
    ours, reference = sparsegpt(weight, hessian, sparsity), published(weight, hessian, sparsity)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert ours.shape == weight.shape
    assert ours.dtype == torch.float32
    assert int((ours == 0).sum()) == int(weight.numel() * sparsity)
    errors = [output_error(weight - new, hessian) for new in (ours, reference)]
    assert errors[0] <= 1.01 * errors[1]
    same = ((ours == 0) == (reference == 0)).float().mean()
    assert same > 0.995  # all but ties in float32; one tie moves what comes after it in its row
    if same == 1:
        assert errors[0] == pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize("keep", [(2, 4), (4, 8), (1, 2)])
@pytest.mark.parametrize(("out_features", "width"), [(17, 24), (31, 264), (8, 408)])
def test_n_of_m_is_the_published_algorithms(out_features, width, keep):
    weight, hessian = layer(out_features, width, 1)
    ours = prune_by_sparsegpt(weight, hessian, 0.5, pattern=Pattern(keep=keep)).weight
    zeros = (ours == 0).reshape(out_features, -1, keep[1]).sum(dim=2)
    assert bool((zeros == keep[1] - keep[0]).all())
    reference = published(weight, hessian, 0.5, keep=keep)
    errors = [output_error(weight - new, hessian) for new in (ours, reference)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.parametrize("keep", [(1, 3), (5, 7), (40, 100), (1, 300)])
def test_n_of_m_whose_groups_do_not_fill_128_columns(keep):
    weight, hessian = layer(9, 2 * keep[1], 1)
    found = prune_by_sparsegpt(weight, hessian, 0.5, pattern=Pattern(keep=keep))
    assert bool(((found.weight == 0).reshape(9, 2, keep[1]).sum(dim=2) == keep[1] - keep[0]).all())
    masked = weight * wanda_mask_n_of_m(weight, hessian.diagonal().sqrt(), *keep)
    assert output_error(weight - found.weight, hessian) < output_error(masked, hessian)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_its_error_is_below_wandas_and_magnitudes(seed, sparsity):
    weight, hessian = layer(24, 64 + seed, seed)
    norm = hessian.diagonal().sqrt()
    ours = output_error(weight - sparsegpt(weight, hessian, sparsity), hessian)
    for mask in (wanda_mask(weight, norm, sparsity), magnitude_mask(weight, sparsity)):
        assert ours < output_error(weight * mask, hessian)
    weight, hessian = weight[:, :64], hessian[:64, :64]
    ours = output_error(weight - prune_by_sparsegpt(weight, hessian, 0.5, pattern=TWO_OF_FOUR).weight, hessian)
    for scale in (norm[:64], torch.ones(64)):
        assert ours < output_error(weight * wanda_mask_n_of_m(weight, scale, 2, 4), hessian)


def test_independent_inputs_leave_magnitude_block_by_block():
    weight, _ = layer(17, 300, 2)
    ours = sparsegpt(weight, 3 * torch.eye(300), 0.5)
    removed = [int(17 * end * 0.5) - int(17 * begin * 0.5) for begin, end in ((0, 128), (128, 256), (256, 300))]
    for part, old, count in zip(ours.split(128, dim=1), weight.split(128, dim=1), removed, strict=True):
        threshold = old.abs().flatten().sort().values[count - 1]
        assert torch.equal(part, old.masked_fill(old.abs() <= threshold, 0))  # nothing else moves
    pruned = prune_by_sparsegpt(weight, torch.eye(300), 0.0, pattern=TWO_OF_FOUR)
    assert torch.equal(pruned.weight, weight.masked_fill(all_but_highest(weight.abs(), 2, 4), 0))
    assert torch.equal(pruned.mask, pruned.weight == 0)


def test_inputs_of_different_energy_leave_wandas_score():
    """A diagonal Hessian: cost w² · (H_ii + λ), and no column can make up for another."""
    weight, _ = layer(23, 96, 3)
    energy = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    score = weight.abs() * (energy + 0.01 * energy.mean()).sqrt()
    assert torch.equal(sparsegpt(weight, torch.diag(energy), 0.37), weight.masked_fill(magnitude_mask(score, 0.37), 0))


def test_one_column_is_removed_at_the_closed_forms_cost():
    """Removing w_0 for good: the others move by −w_0 · [H⁻¹]_0,: / [H⁻¹]_00, at the cost w_0² / [H⁻¹]_00."""
    weight, hessian = layer(1, 9, 4, tokens=90)
    weight[0, 0] = 1e-3  # in the mask of 1 of 9 for sure
    ours = sparsegpt(weight, hessian, 1 / 9, damping=0.0)
    inverse = torch.linalg.inv(hessian.double())
    expected = weight.double() - weight[0, 0].double() * inverse[0] / inverse[0, 0]
    assert torch.allclose(ours.double(), expected, atol=1e-7)
    cost = output_error(weight - ours, hessian)
    assert cost == pytest.approx(float(weight[0, 0].double() ** 2 / inverse[0, 0]), rel=1e-2)


def test_nothing_is_removed_and_nothing_moves():
    weight, hessian = layer(5, 140, 5)
    assert torch.equal(sparsegpt(weight, hessian, 0.0), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_and_any_scale_of_the_hessian(dtype):
    weight, hessian = layer(19, 150, 6)
    weight = weight.to(dtype)
    ours = sparsegpt(weight, hessian, 0.5)
    assert torch.equal(ours, sparsegpt(weight.float(), hessian, 0.5))
    for scale in (2.0**-40, 2.0**30):
        assert torch.allclose(sparsegpt(weight, scale * hessian, 0.5), ours, atol=1e-5)


@pytest.mark.parametrize("block", [(4, 1), (2, 5), (1, 16), (8, 160)])
def test_blocks_go_whole(block):
    weight, hessian = layer(24, 320, 7)
    ours = prune_by_sparsegpt(weight, hessian, 0.5, pattern=Pattern(block=block)).weight
    tiles = (ours == 0).reshape(24 // block[0], block[0], 320 // block[1], block[1])
    gone = tiles.all(dim=3).all(dim=1)
    assert torch.equal(gone, tiles.any(dim=3).any(dim=1))
    assert int(gone.sum()) == gone.numel() // 2
    mask = lowest_blocks(weight.square() * hessian.diagonal(), 0.5, block)
    assert output_error(weight - ours, hessian) < output_error(weight * mask, hessian)


def test_zeros_stay_zeros():
    weight, hessian = layer(16, 200, 8)
    once = sparsegpt(weight, hessian, 0.4)
    twice = sparsegpt(once, hessian, 0.6)
    assert bool((twice[once == 0] == 0).all())
    assert int((twice == 0).sum()) == int(16 * 200 * 0.6)
    assert bool((sparsegpt(once, hessian, 0.2)[once == 0] == 0).all())  # more are zero than was asked for


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_inputs_that_never_spoke_go_first_and_cost_nothing(share):
    weight, hessian = layer(12, 96, 9)
    hessian[::2], hessian[:, ::2] = 0, 0  # half of the inputs
    ours = sparsegpt(weight, hessian, share)
    assert int((ours == 0).sum()) == int(12 * 96 * share)
    assert torch.equal(ours[:, 1::2], weight[:, 1::2])
    assert output_error(weight - ours, hessian) == 0
    dead = weight[:, ::2]
    assert torch.equal(
        ours[:, ::2] == 0, magnitude_mask(dead, share * 2) if share < 0.5 else torch.ones_like(dead) == 1
    )


def test_no_input_ever_spoke():
    weight, _ = layer(8, 20, 10)
    assert torch.equal(sparsegpt(weight, torch.zeros(20, 20), 0.5), weight.masked_fill(magnitude_mask(weight, 0.5), 0))


def test_damping_recovers_by_itself():
    generator = torch.Generator().manual_seed(11)
    inputs = torch.randn(3, 40, generator=generator)  # 3 tokens: rank 3 of 40
    weight, hessian = torch.randn(6, 40, generator=generator), inputs.T @ inputs
    found = prune_by_sparsegpt(weight, hessian, 0.5, damping=0.0)
    assert 0 < found.damping <= 0.01
    assert bool(found.weight.isfinite().all())
    assert int((found.weight == 0).sum()) == 120
    assert prune_by_sparsegpt(weight, hessian, 0.5).damping == 0.01


def test_the_factors_are_those_of_the_damped_hessian():
    _, hessian = layer(1, 53, 12)
    factor = factorize(hessian, 0.05)
    expected = hessian.double() / hessian.diagonal().double().mean() + 0.05 * torch.eye(53)
    upper = factor.upper.double()
    assert torch.allclose(upper * factor.pivots.double() @ upper.T, expected, atol=1e-5)
    assert torch.equal(upper, upper.triu())
    assert torch.equal(upper.diagonal(), torch.ones(53, dtype=torch.float64))
    inverse = [torch.linalg.inv(expected[start:, start:])[0, 0] for start in (0, 17, 52)]
    # D_j is 1 / [H⁻¹]_jj of the columns from j on, which is 1 / [Cholesky factor of H⁻¹]_jj²
    cholesky = torch.linalg.cholesky(torch.linalg.inv(expected), upper=True).diagonal()
    assert torch.allclose(factor.pivots.double(), cholesky**-2, rtol=1e-4)
    assert torch.allclose(factor.pivots[[0, 17, 52]].double() * torch.stack(inverse), torch.ones(3).double(), rtol=1e-4)


@pytest.mark.parametrize("pattern", [Pattern(), TWO_OF_FOUR, Pattern(block=(4, 2))], ids=str)
def test_sweeps_end_where_least_squares_over_the_kept_weights_do(pattern):
    """A row w that keeps the columns S is best at H_SS⁻¹ H_S: w; here one row after the other, in float64."""
    weight, hessian = layer(12, 140, 13, spread=0.0)
    found = [prune_by_sparsegpt(weight, hessian, 0.5, pattern=pattern, sweeps=count) for count in (0, 1, 3, 400)]
    damped = hessian.double() / hessian.diagonal().double().mean() + 0.01 * torch.eye(140)
    best = torch.zeros(12, 140, dtype=torch.float64)
    for row, (values, mask) in enumerate(zip(weight.double(), found[0].mask, strict=True)):
        kept = (~mask).nonzero().flatten()
        best[row, kept] = torch.linalg.solve(damped[kept][:, kept], damped[kept] @ values)
    errors = [output_error(weight.double() - each, damped) for each in (*(one.weight.double() for one in found), best)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.8 * errors[0]
    assert torch.allclose(found[-1].weight.double(), best, atol=1e-3)
    assert all(torch.equal(one.mask, found[0].mask) for one in found)
    assert all((one.weight[one.mask] == 0).all() for one in found)


def test_a_kept_weight_whose_input_is_always_zero_stays_as_it_was():
    weight, hessian = layer(10, 40, 3)
    hessian[:, 7], hessian[7, :] = 0, 0
    found = prune_by_sparsegpt(weight, hessian, 0.02, sweeps=2)  # fewer weights than the column has
    kept = ~found.mask[:, 7]
    assert kept.any()
    assert torch.allclose(found.weight[kept, 7], weight[kept, 7], atol=1e-6)


@pytest.mark.parametrize("grid", [integer_grid(4, 32), integer_grid(3, symmetric=False), INT8], ids=str)
def test_its_mask_and_gptq_are_nearer_than_rounding_in_the_published_pass(grid):
    weight, hessian = layer(40, 320, 15)
    scale, zero = (each.repeat_interleave(320 // each.shape[1], dim=1) for each in grid_parameters(weight, grid))

    def quantize(values, column):
        steps = (values / scale[:, column]).round() + zero[:, column]
        return (steps.clamp(grid.lowest, grid.highest) - zero[:, column]) * scale[:, column].double()

    joint = published(weight, hessian, 0.5, quantize=quantize)
    mask = prune_by_sparsegpt(weight, hessian, 0.5).mask
    ours = round_by_gptq(weight, hessian, grid, pruned=mask, clip=True, sweeps=3).weight
    assert (ours[mask] == 0).all()
    assert output_error(weight - ours, hessian) < 0.9 * output_error(weight - joint, hessian)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1\.0"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": float("nan")}, r"sparsity must be in \[0, 1\)"),
        ({"weight": torch.ones(6)}, r"weight must be \(out, in\), got \(6,\)"),
        ({"weight": torch.full((2, 6), torch.nan)}, "weight is not finite"),
        ({"hessian": torch.eye(5)}, r"hessian must be \(6, 6\), got \(5, 5\)"),
        ({"hessian": torch.full((6, 6), torch.inf)}, "hessian is not finite: look for inf or nan"),
        ({"hessian": -torch.eye(6)}, r"no gram matrix .* pass the sum of x xᵀ"),
        ({"hessian": torch.eye(6) + 10 * torch.ones(6, 6).triu(1)}, "no gram matrix"),
        ({"hessian": 1 - torch.eye(6) * 0.9 - 20 * (torch.eye(6) == 0)}, "not positive semi-definite: damping of 10"),
        ({"damping": -0.1}, r"damping must be in \[0, 10\], got -0.1"),
        ({"pattern": TWO_OF_FOUR}, "2:4 needs rows of a multiple of 4 weights, got 6"),
        ({"pattern": Pattern(block=(4, 1))}, "blocks of 4x1 do not tile a matrix of 2x6"),
    ],
)
def test_what_is_refused(change, message):
    arguments = {"weight": torch.ones(2, 6), "hessian": torch.eye(6), "sparsity": 0.5} | change
    with pytest.raises(ValueError, match=message):
        prune_by_sparsegpt(**arguments)
