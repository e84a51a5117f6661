import pytest
import torch
from torch import nn

from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.cost import (
    Dimensions,
    all_block_parameters,
    block_macs,
    macs_per_token,
    training_flops,
    units_kept,
)
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads

PRIMES = {"hidden": 35, "heads": 5, "blocks": 3, "feed_forward": 53}  # head size 7
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def uneven(tiny_model, family):
    model = tiny_model(family, **PRIMES)
    keep_heads(model.anatomy.blocks[1], [0, 4])
    keep_feed_forward(model.anatomy.blocks[2], torch.arange(11))
    return model


@families
def test_macs_equal_a_count_of_what_every_layer_multiplies(tiny_model, family):
    model, rows, length = uneven(tiny_model, family), 3, 13
    counted = []

    def count(linear, given, made):
        counted.append(made.numel() * linear.in_features)

    for module in model.network.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.network(input_ids=torch.full((rows, length), 20))
    # attention has no layer of its own: scores and mixing are each length × length × head size, a head
    attention = sum(2 * rows * length**2 * 7 * shape.heads for shape in model.anatomy.shapes)
    expected = macs_per_token(model.dimensions, length) * rows * length
    assert sum(counted) + attention == pytest.approx(expected, rel=1e-12)


@families
def test_parameters_equal_the_networks_own(tiny_model, family):
    model = uneven(tiny_model, family)
    for block in model.anatomy.blocks:
        own = sum(parameter.numel() for parameter in block.module.parameters())
        assert all_block_parameters(block.shape, 35, 7) == own


def test_a_minilm_block_by_hand():
    shape = BlockShape(heads=12, feed_forward=1536)
    assert all_block_parameters(shape, hidden=384, head_size=32) == 1_774_464
    # 4·384² + 2·384·1536 weights, and for each of 100 tokens 2·384 in attention
    assert block_macs(shape, hidden=384, head_size=32, length=100) == 589_824 + 1_179_648 + 76_800


def test_backward_costs_twice_the_forward_where_there_is_one():
    dimensions = Dimensions(8, 4, (BlockShape(2, 16),) * 3, head_parameters=80)
    block = 4 * 8 * 8 + 2 * 8 * 16 + 2 * 10 * 8
    forward = 3 * block + 80 / 10
    assert macs_per_token(dimensions, 10) == forward
    assert training_flops(dimensions, 10, tokens=7) == pytest.approx(7 * 2 * 3 * forward)
    assert training_flops(dimensions, 10, 7, lowest_trained=2) == pytest.approx(7 * 2 * (forward + 2 * (block + 8)))
    assert training_flops(dimensions, 10, 7, lowest_trained=3) == pytest.approx(7 * 2 * (forward + 2 * 8))


@pytest.mark.parametrize(
    ("units", "removed", "multiple_of", "kept"),
    [
        (12, 0.5, 1, 6), (12, 0.0, 1, 12), (12, 0.3, 1, 9), (12, 0.99, 1, 1), (1, 0.9, 1, 1),
        (10, 0.7, 1, 3), (100, 0.29, 1, 71),  # products that floating point puts just below a whole number
        (12, 1 - 1e-12, 1, 1),
        (1536, 0.5, 8, 768), (53, 0.5, 8, 32), (53, 0.05, 8, 53), (7, 0.5, 8, 7), (3072, 0.9, 64, 320),
    ],
)  # fmt: skip
def test_units_kept(units, removed, multiple_of, kept):
    assert units_kept(units, removed, multiple_of) == kept
