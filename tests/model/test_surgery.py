import pytest
import torch

from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward, keep_heads, set_blocks

PRIMES = {"hidden": 35, "heads": 5, "blocks": 3, "feed_forward": 53}  # head size 7
TEXTS = ["the film was good", "bad", "what a lovely hotel , we all said so in the end", "电影很好。"]
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def logits(model):
    inputs = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.network.eval()(**inputs).logits


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def zero_inputs(linear, features):
    """What a mask of zeros before this layer does."""
    with torch.no_grad():
        linear.weight[:, features] = 0


@families
def test_removing_heads_equals_masking_them(tiny_model, family):
    masked, cut, whole = (tiny_model(family, **PRIMES) for _ in range(3))
    kept = {0: [1, 4], 2: [0, 2, 3]}  # other heads in each block, and block 1 whole
    for index, heads in kept.items():
        gone = [head * 7 + offset for head in range(5) if head not in heads for offset in range(7)]
        zero_inputs(masked.anatomy.blocks[index].attention_output, gone)
        keep_heads(cut.anatomy.blocks[index], heads)
    same(logits(cut), logits(masked))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3  # so that the equality says something
    assert [shape.heads for shape in cut.anatomy.shapes] == [2, 5, 3]
    assert cut.parameters == whole.parameters - (3 + 2) * (4 * 7 * 35 + 3 * 7)


@families
def test_removing_neurons_equals_masking_them(tiny_model, family):
    masked, cut, whole = (tiny_model(family, **PRIMES) for _ in range(3))
    kept = torch.tensor([index for index in range(53) if index % 3])
    zero_inputs(masked.anatomy.blocks[1].down, [index for index in range(53) if not index % 3])
    keep_feed_forward(cut.anatomy.blocks[1], kept)
    same(logits(cut), logits(masked))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3
    assert [shape.feed_forward for shape in cut.anatomy.shapes] == [53, 35, 53]
    assert cut.parameters == whole.parameters - 18 * (2 * 35 + 1)


@families
def test_dropping_a_block_equals_skipping_it(tiny_model, family):
    skipped, cut, whole = (tiny_model(family, **PRIMES) for _ in range(3))

    def pass_through(_, given, made):
        return (given[0], *made[1:]) if isinstance(made, tuple) else given[0]

    skipped.anatomy.blocks[1].module.register_forward_hook(pass_through)
    keep_blocks(cut.network, [0, 2])
    same(logits(cut), logits(skipped))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3
    assert getattr(cut.network.config, cut.anatomy.family.layers) == len(cut.anatomy.blocks) == 2


def test_blocks_taken_out_for_a_moment_come_back(tiny_model):
    model = tiny_model()
    before, anatomy = logits(model), model.anatomy
    modules = [block.module for block in anatomy.blocks]
    set_blocks(model.network, anatomy, modules[:1])
    assert not torch.equal(logits(model), before)
    set_blocks(model.network, anatomy, modules)
    assert torch.equal(logits(model), before)


def test_parameters_keep_their_identity(tiny_model):
    """Optimizers and pruning masks hold references: surgery must not make them stale."""
    model = tiny_model(**PRIMES)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    keep_heads(model.anatomy.blocks[0], [3])
    keep_feed_forward(model.anatomy.blocks[0], torch.tensor([0, 9]))
    assert {id(parameter): name for name, parameter in model.network.named_parameters()} == names


def test_units_are_kept_in_the_order_given(tiny_model):
    model = tiny_model(**PRIMES)
    block = model.anatomy.blocks[0]
    up, down = block.up.weight.clone(), block.down.weight.clone()
    keep_feed_forward(block, torch.tensor([51, 2]))
    assert torch.equal(block.up.weight, up[[51, 2]])
    assert torch.equal(block.down.weight, down[:, [51, 2]])
