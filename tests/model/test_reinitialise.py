"""The highest blocks drawn anew: those alone, by the family's rule, the same for the same seed."""

import pytest
import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.finetuning import finetune
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.reinitialise import draw_blocks
from moss_rlhf.optimization import prune


def _of_blocks(model):
    states = (block.module.state_dict() for block in model.anatomy.blocks)
    return [{name: value.clone() for name, value in state.items()} for state in states]


def _moved(one, other):
    pairs = zip(one, other, strict=True)
    return [any(not torch.equal(value, new[name]) for name, value in old.items()) for old, new in pairs]


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.shared])
def test_only_the_highest_blocks_change_and_the_seed_decides(family, tiny_model):
    model, again, other = tiny_model(family), tiny_model(family), tiny_model(family)
    before = _of_blocks(model)
    outside = {name: value.clone() for name, value in (*model.anatomy.embeddings, *model.anatomy.head)}
    draw_blocks(model.network, 2, seed=3)
    draw_blocks(again.network, 2, seed=3)
    draw_blocks(other.network, 2, seed=4)
    assert _moved(before, _of_blocks(model)) == [False] * (len(before) - 2) + [True] * 2
    assert not any(_moved(_of_blocks(model), _of_blocks(again)))
    assert _moved(_of_blocks(model), _of_blocks(other))[-1]
    parameters = dict(model.network.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in outside.items())


def test_matrices_have_the_spread_of_the_config_and_biases_are_zero(tiny_model):
    model = tiny_model(hidden=64, feed_forward=128)
    draw_blocks(model.network, 1, seed=0)
    block = model.anatomy.blocks[-1]
    for matrix in block.matrices:
        assert float(matrix.weight.std()) == pytest.approx(model.network.config.initializer_range, rel=0.1)
        assert not matrix.bias.any()
    assert torch.equal(block.module.output.LayerNorm.weight, torch.ones(64))


def test_random_numbers_of_the_caller_and_pruned_zeros_stay(tiny_model):
    model = tiny_model()
    prune(model, sparsity=0.5)
    zeros = [parameter == 0 for parameter in model.pruned]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    draw_blocks(model.network, 1, 0, model.pruned)
    assert torch.equal(torch.rand(1), expected)
    assert all(bool((parameter[zero] == 0).all()) for parameter, zero in zip(model.pruned, zeros, strict=True))


def test_what_can_not_be_drawn_is_refused(tiny_model):
    with pytest.raises(ModelError, match="share one block"):
        draw_blocks(tiny_model("albert").network, 1, 0)
    with pytest.raises(ModelError, match="4 of 3 blocks"):
        draw_blocks(tiny_model().network, 4, 0)


def test_a_training_starts_from_the_drawn_blocks(tiny_model, rows):
    """At a rate of next to nothing what training leaves is what it started with."""
    options = {"epochs": 1, "learning_rate": 1e-30, "weight_decay": 0.0, "precision": "float32"}
    model, drawn = tiny_model(), tiny_model()
    draw_blocks(drawn.network, 1, seed=7)
    finetune(model, rows[:8], rows[:8], reinitialise=1, seed=7, **options)
    started = drawn.network.state_dict()
    for name, value in model.network.state_dict().items():
        torch.testing.assert_close(value, started[name], atol=1e-20, rtol=0)
