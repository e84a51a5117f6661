import pytest
import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES, BlockShape, anatomy_of, family_of

PRIMES = {"hidden": 35, "heads": 5, "blocks": 3, "feed_forward": 53}  # head size 7
families = pytest.mark.parametrize("family", sorted(FAMILIES))


@families
def test_every_part_is_found_with_its_shape(tiny_model, family):
    anatomy = anatomy_of(tiny_model(family, **PRIMES).network)
    assert anatomy.shapes == (BlockShape(5, 53),) * 3
    for block in anatomy.blocks:
        shapes = [tuple(linear.weight.shape) for linear in block.linears]
        assert shapes == [(35, 35), (35, 35), (35, 35), (35, 35), (53, 35), (35, 53)]
        assert block.head_size == 7
        assert getattr(block.attention, block.head_count) == 5


@families
def test_embeddings_blocks_and_head_hold_every_parameter_exactly_once(tiny_model, family):
    network = tiny_model(family).network
    anatomy = anatomy_of(network)
    in_blocks = [parameter for block in anatomy.blocks for parameter in block.module.parameters()]
    parts = [*(part for _, part in anatomy.embeddings), *in_blocks, *(part for _, part in anatomy.head)]
    assert sorted(map(id, parts)) == sorted(map(id, network.parameters()))
    names = dict(network.named_parameters())
    assert all(names[name] is part for name, part in anatomy.embeddings + anatomy.head)
    assert all("embed" in name.lower() for name, _ in anatomy.embeddings)
    assert all("pooler" in name or "classifier" in name for name, _ in anatomy.head)


@families
def test_query_key_and_value_are_what_their_names_say(tiny_model, family):
    """Without keys every token attends to all alike; without values or output, attention adds nothing but biases."""
    model = tiny_model(family, blocks=1)
    block = model.anatomy.blocks[0]
    inputs = model.tokenizer("the film was good", return_tensors="pt")
    states = []
    hook = block.attention_output.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    with torch.no_grad():
        block.key.weight.zero_(), block.key.bias.zero_()
        model.network(**inputs)
        block.value.weight.zero_()
        model.network(**inputs)
    hook.remove()
    alike, nothing = states
    torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), rtol=0, atol=1e-6)
    torch.testing.assert_close(nothing, block.value.bias.detach().expand_as(nothing), rtol=0, atol=1e-6)


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(ModelError, match=r"'mamba' is not known.*bert, distilbert, electra, roberta, xlm-roberta"):
        family_of("mamba")
