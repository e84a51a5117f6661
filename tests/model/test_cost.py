import pytest
import torch
from torch import nn

from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.cost import (
    Dimensions,
    all_block_parameters,
    block_macs,
    block_parameters,
    macs_per_token,
    training_flops,
    units_kept,
)
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads

SIZES = {"hidden": 36, "heads": 6, "blocks": 3, "feed_forward": 53}
BIASED = [
    "bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "albert", "gpt2", "gpt_neox", "opt",
    "bart", "marian",
]  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def uneven(tiny_model, family):
    """Every block different, but for T5's, which must have the same heads."""
    model = tiny_model(family, **SIZES)
    for index, block in enumerate(model.anatomy.blocks):
        for attention in block.attentions:
            keep_heads(attention, [0, 1] if model.anatomy.family.same_heads else range(1 + index % 3))
        keep_feed_forward(block, torch.arange(11 + index))
    return model


@families
def test_macs_equal_a_count_of_what_every_layer_multiplies(tiny_model, family):
    model, rows, length = uneven(tiny_model, family), 3, 13
    counted = []

    def count(module, given, made):
        if given[0].shape[0] > 1:  # DeBERTa's relative positions are one row, whatever the batch
            counted.append(made.numel() * module.weight.numel() // (module.weight.shape[0 if linear(module) else 1]))

    def linear(module):
        return isinstance(module, (nn.Linear, nn.Conv1d))  # transformers' Conv1D has its outputs second

    for module in model.network.modules():
        if linear(module) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(count)
    tokens = torch.full((rows, length), 20)
    with torch.no_grad():
        model.network(input_ids=tokens, **({"labels": tokens} if model.task == "translation" else {}))
    # attention has no layer of its own: scores and mixing are each length × length × head size, a head
    size, repeats = model.anatomy.blocks[0].attention.head_size, model.anatomy.repeats
    heads = sum(shape.heads + shape.cross_heads for shape in model.anatomy.shapes)
    attention = repeats * 2 * rows * length**2 * size * heads
    expected = macs_per_token(model.dimensions, length) * rows * length
    assert sum(counted) + attention == pytest.approx(expected, rel=1e-12)


@families
def test_matrices_have_as_many_weights_as_the_networks_own(tiny_model, family):
    model = uneven(tiny_model, family)
    for block in model.anatomy.blocks:
        own = sum(matrix.parameter.numel() for matrix in block.matrices)
        assert block_parameters(block.shape, model.dimensions) == own


@pytest.mark.parametrize("family", BIASED)
def test_parameters_equal_the_networks_own(tiny_model, family):
    model = uneven(tiny_model, family)
    for block in model.anatomy.blocks:
        own = sum(parameter.numel() for parameter in block.module.parameters())
        assert all_block_parameters(block.shape, model.dimensions) == own


def test_a_minilm_block_by_hand():
    shape = BlockShape(heads=12, feed_forward=1536)
    minilm = Dimensions(384, 32, (shape,) * 6, head_parameters=0)
    assert all_block_parameters(shape, minilm) == 1_774_464
    # 4·384² + 2·384·1536 weights, and for each of 100 tokens 2·384 in attention
    assert block_macs(shape, minilm, length=100) == 589_824 + 1_179_648 + 76_800


def test_a_llama_block_by_hand():
    """Llama 3.2 1B: 32 query heads of 64 and 8 key-value heads, three matrices of 2048 × 8192."""
    shape = BlockShape(heads=32, feed_forward=8192)
    llama = Dimensions(2048, 64, (shape,) * 16, 0, projection_parameters=128256 * 2048, gated=True, queries_per_key=4)
    assert block_parameters(shape, llama) == 2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 8192
    assert macs_per_token(llama, 1) == 128256 * 2048 + 16 * (60_817_408 + 2 * 2048)


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
