import pytest
import torch

from moss_rlhf.model.grid import (
    INT8,
    Grid,
    dequantize,
    grid_codes,
    grid_parameters,
    integer_grid,
    round_to_grid,
    round_to_int8,
)

GRIDS = [
    integer_grid(bits, size, symmetric=kind, scale_bits=scale_bits)
    for bits in range(2, 9)
    for size in (None, 7)
    for kind in (True, False)
    for scale_bits in ((8, 16) if bits <= 6 else (bits + 2, 16))
]


def weights_of_all_magnitudes():
    """999 rows of 35 weights from 1e-45 to 1e36; some zeros, some rows of one sign, one of zeros, ties at both ends."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.linspace(-45, 36, 995, dtype=torch.float64)[:, None]
    weight = (torch.randn(995, 35, generator=generator, dtype=torch.float64) * size).float()
    weight[::7, ::3] = 0
    weight[::11] = weight[::11].abs()
    weight[5::11] = -weight[5::11].abs()
    special = torch.zeros(4, 35)
    special[1], special[2, ::7], special[3, ::2] = torch.linspace(-1, 1, 35), 3.0, -5.0
    return torch.cat([weight, special])


@pytest.mark.parametrize("grid", [*GRIDS, INT8], ids=str)
def test_rounding_is_exact_and_a_fixed_point_bit_for_bit(grid):
    weight = weights_of_all_magnitudes()
    scale, zero = grid_parameters(weight, grid)
    codes = grid_codes(weight, scale, zero, grid)
    rounded = dequantize(codes, scale, zero)
    assert torch.equal(rounded, round_to_grid(weight, grid))
    assert codes.min() >= grid.lowest
    assert codes.max() <= grid.highest

    steps = codes.reshape(*scale.shape, -1).double() - zero[:, :, None]
    assert torch.equal(rounded.double(), (steps * scale[:, :, None].double()).reshape(weight.shape))  # exact in float32
    assert torch.equal(grid_codes(rounded, scale, zero, grid), codes)  # with stored scales

    live = (steps != 0).any(dim=2)
    found, found_zero = grid_parameters(rounded, grid)  # with scales found anew
    assert torch.equal(found[live], scale[live])
    assert torch.equal(found_zero[live], zero[live])
    assert torch.equal(round_to_grid(rounded, grid), rounded)
    assert live.float().mean() > 0.8


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_scales_are_exact_in_the_types_that_runtimes_store(grid):
    scale, _ = grid_parameters(weights_of_all_magnitudes(), grid)
    normal = scale[scale > 2.0**-120]  # below, bfloat16 itself loses bits
    mantissa = torch.frexp(normal).mantissa * 2**grid.scale_bits
    assert torch.equal(mantissa, mantissa.round())
    if grid.scale_bits == 8:
        assert torch.equal(normal.bfloat16().float(), normal)
        usual = scale[(scale > 2.0**-17) & (scale < 2.0**15)]
        assert torch.equal(usual.half().float(), usual)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_weight_moves_to_its_nearest_code(grid):
    weight = weights_of_all_magnitudes()[300:]
    scale, _ = grid_parameters(weight, grid)
    step = scale.double().repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    error = (round_to_grid(weight, grid).double() - weight.double()).abs() / step
    # asymmetric scales are rounded down: the ends may be clipped by that, at most 2^-7 of the range
    clipped = 0 if grid.symmetric else grid.highest * 2.0 ** (1 - grid.scale_bits)
    assert error.max() <= 0.5 + clipped + 1e-6


def test_symmetric_codes_by_hand():
    weight = torch.tensor([[7.0, -3.4, 0.5, 1.5, 0.0, 0.1, -0.2, 0.35]])
    grid = integer_grid(4, 4, scale_bits=8)
    scale, zero = grid_parameters(weight, grid)
    assert scale.tolist() == [[1.0, 205 / 4096]]  # 0.35 / 7 · 4096 = 204.8, rounded up to 8 bits
    assert zero.tolist() == [[0, 0]]
    assert grid_codes(weight, scale, zero, grid).tolist() == [[7, -3, 0, 2, 0, 2, -4, 7]]
    assert round_to_grid(weight, grid)[0, :4].tolist() == [7.0, -3.0, 0.0, 2.0]


def test_asymmetric_codes_by_hand():
    weight = torch.tensor([[-3.0, 12.0, 0.4, 5.6], [2.0, 30.0, 3.0, 0.0], [-1.0, -0.5, -0.25, -0.125]])
    grid = integer_grid(4, None, symmetric=False, scale_bits=8)
    scale, zero = grid_parameters(weight, grid)
    assert scale.flatten().tolist() == [1.0, 2.0, 136 / 2048]  # 1/15 · 2048 = 136.5, rounded down to 8 bits
    assert zero.flatten().tolist() == [3, 0, 15]
    codes = grid_codes(weight, scale, zero, grid)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[0, 15, 3, 9], [1, 15, 2, 0], [0, 7, 11, 13]]  # 1.5 steps round to even
    assert dequantize(codes, scale, zero)[0].tolist() == [-3.0, 12.0, 0.0, 6.0]


def test_both_ends_are_reached_where_both_lie_half_a_step_off():
    weight = torch.tensor([[-7.4999, 7.4999]])  # a scale rounded up would give 7 codes below zero and 7 above: 14 of 15
    grid = integer_grid(4, symmetric=False, scale_bits=8)
    assert grid_codes(weight, *grid_parameters(weight, grid), grid).tolist() == [[0, 15]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros_so_pruned_weights_stay_pruned(symmetric):
    weight = weights_of_all_magnitudes()
    rounded = round_to_grid(weight, integer_grid(3, 5, symmetric=symmetric))
    assert (rounded[weight == 0] == 0).all()


def test_groups_are_rows_of_their_own():
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    grouped = round_to_grid(weight, integer_grid(4, 3))
    apart = round_to_grid(weight.reshape(20, 3), integer_grid(4)).reshape(5, 12)
    assert torch.equal(grouped, apart)
    assert torch.equal(round_to_grid(weight, integer_grid(4, -1)), round_to_grid(weight, integer_grid(4, 12)))


def test_ctranslate2_finds_the_codes_of_the_int8_grid():
    weight = weights_of_all_magnitudes()[300:900]  # rows that it can hold
    grid = integer_grid(8)
    scale, zero = grid_parameters(weight, grid)
    codes = grid_codes(weight, scale, zero, grid)
    rounded = dequantize(codes, scale, zero)
    largest = rounded.abs().amax(dim=1, keepdim=True)
    theirs = torch.where(largest > 0, 127 / largest, 1)  # its formula, in float32
    assert torch.equal((rounded * theirs).round().to(torch.int8), codes)


def test_compressed_tensors_holds_every_code_of_four_bits():
    weight = weights_of_all_magnitudes()
    for symmetric, shift in ((True, 0), (False, 8)):
        grid = integer_grid(4, 5, symmetric=symmetric, scale_bits=8)
        scale, zero = grid_parameters(weight, grid)
        stored = grid_codes(weight, scale, zero, grid).int() - shift
        assert stored.min() >= -8
        assert stored.max() <= 7
        assert torch.equal(dequantize(stored, scale, zero - shift), round_to_grid(weight, grid))


def test_int8_is_one_of_these_grids():
    weight = weights_of_all_magnitudes()
    assert torch.equal(round_to_int8(weight), round_to_grid(weight, Grid(-64, 64)))


@pytest.mark.parametrize("bits", [0, 1, 9, -4])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=f"bits must be 2 to 8, got {bits}"):
        integer_grid(bits)


@pytest.mark.parametrize(("bits", "scale_bits"), [(8, 8), (7, 8), (4, 5), (2, 17)])
def test_scales_too_coarse_for_the_codes_or_too_fine_for_float32(bits, scale_bits):
    with pytest.raises(ValueError, match=f"scale_bits must be {bits + 2} to 16 for codes of {bits} bits"):
        integer_grid(bits, scale_bits=scale_bits)


@pytest.mark.parametrize("size", [0, -2])
def test_a_group_needs_a_weight(size):
    with pytest.raises(ValueError, match=f"at least 1.*got {size}"):
        integer_grid(4, size)


@pytest.mark.parametrize(("width", "size"), [(8, 128), (8, 3), (128, 129)])
def test_groups_must_fill_a_row(width, size):
    with pytest.raises(ValueError, match=f"group_size {size} does not divide rows of {width} weights; give a divisor"):
        round_to_grid(torch.ones(2, width), integer_grid(4, size))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_not_finite_has_no_grid(value, symmetric):
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="not finite"):
        grid_parameters(weight, integer_grid(4, 2, symmetric=symmetric))
