import pytest
import torch
from torch import nn

from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.grid import int8_codes, int8_scale, quantized_weights, round_to_int8

TINIEST = 2.0**-149


def rows_of_all_magnitudes():
    """1,200 rows from 1e-45 to 1e37, some with zeros among their weights, one of nothing else."""
    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.linspace(-45, 37, 1199, dtype=torch.float64)[:, None]
    weight = (torch.randn(1199, 17, generator=generator, dtype=torch.float64) * size).float()
    weight[::7, ::3] = 0
    special = torch.zeros(4, 17)
    special[1, 0], special[2, :2], special[3, 0] = TINIEST, torch.tensor([2.0**-126, TINIEST]), -1.0
    return torch.cat([weight, special])


def test_the_grid_is_exact_and_found_again_from_its_largest_weight():
    weight = rows_of_all_magnitudes()
    scale = int8_scale(weight)
    codes = int8_codes(weight, scale)
    rounded = round_to_int8(weight)
    exact = codes.double() * scale.double()
    assert torch.equal(rounded.double(), exact)  # code · scale is exact in float32
    assert torch.equal(int8_scale(rounded), scale.where(codes.any(1, keepdim=True), torch.ones(())))
    assert torch.equal(round_to_int8(rounded), rounded)  # bit for bit: a fixed point
    live = codes.any(dim=1)
    assert live.sum() > 1000
    assert torch.equal(rounded.abs().amax(dim=1, keepdim=True)[live] / 64, scale[live])
    assert torch.equal(codes.abs().amax(dim=1)[live], torch.full((int(live.sum()),), 64, dtype=torch.int8))


def test_every_weight_moves_to_its_nearest_code():
    weight = rows_of_all_magnitudes()
    scale = int8_scale(weight).double()
    live = int8_codes(weight, scale.float()).any(dim=1)
    error = (round_to_int8(weight).double() - weight.double()).abs()
    assert (error <= scale * (0.5 + 1e-6))[live].all()
    assert (weight[~live].abs() < 64 * 2.0**-133).all()  # only what float32 itself can hardly hold is lost
    assert (round_to_int8(weight)[~live] == 0).all()


def test_a_scale_by_hand():
    weight = torch.tensor([[64.0, -3.4, 0.5, 1.5], [0.0, 0.0, 0.0, 0.0], [0.1, 0.0, -0.1, 0.025]])
    assert int8_scale(weight).flatten().tolist() == [1.0, 1.0, 52429 / 2**25]  # 0.1 / 64 · 2²⁵ = 52428.8, rounded up
    assert int8_codes(weight, int8_scale(weight)).tolist() == [[64, -3, 0, 2], [0, 0, 0, 0], [64, 0, -64, 16]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_has_no_grid(value):
    with pytest.raises(ValueError, match="not finite"):
        int8_scale(torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_and_tables_are_quantized_and_the_head_is_not(tiny_model, family):
    model = tiny_model(family)
    chosen = quantized_weights(model.network)
    if model.anatomy.family.kind == "encoder":  # looked up; DeBERTa reads its relative positions whole
        found = [part for name, part in model.network.named_modules() if "rel_embeddings" not in name]
        tables = {id(module.weight) for module in found if isinstance(module, nn.Embedding)}
    else:  # words alone, whether the head shares them or not: the runtime keeps positions in float
        words = (model.network.get_input_embeddings(), model.network.get_output_embeddings())
        tables = {id(module.weight) for module in words}
    matrices = {id(matrix.parameter) for matrix in model.anatomy.matrices}
    assert {id(part) for part in chosen.values()} == tables | matrices
    assert len(chosen) == len(tables) + len(matrices)
    assert all(parameter.dim() == 2 for parameter in chosen.values())
    if model.anatomy.family.kind == "encoder":
        assert not {id(part) for _, part in model.anatomy.head} & {id(part) for part in chosen.values()}
