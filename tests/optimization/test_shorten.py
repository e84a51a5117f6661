import math

import pytest
import torch

from moss_rlhf import quantize, shorten
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.surgery import keep_blocks
from moss_rlhf.optimization.calibration import mean_loss
from moss_rlhf.optimization.shorten import angular_distance
from moss_rlhf.tasks.loading import encoded


@pytest.mark.parametrize(
    ("before", "after", "distance"),
    [
        ([1.0, 0.0], [5.0, 0.0], 0.0),  # length does not matter
        ([1.0, 0.0], [0.0, 2.0], 0.5),
        ([1.0, 0.0], [-3.0, 0.0], 1.0),
        ([1.0, 0.0], [1.0, 1.0], 0.25),
        ([1.0, 1.0], [1.0, math.sqrt(3)], 1 / 12),  # 45° and 60°
    ],
)
def test_angles_by_hand(before, after, distance):
    found = angular_distance(torch.tensor([[before]]), torch.tensor([[after]]))
    assert found.shape == (1, 1)
    assert float(found) == pytest.approx(distance, abs=1e-7)


def loss_with(tiny_model, rows, kept):
    model = tiny_model(blocks=4)
    keep_blocks(model.network, kept)
    return mean_loss(model, encoded(model, rows))


def test_the_block_goes_whose_loss_is_lowest_one_after_the_other(tiny_model, rows):
    model = tiny_model(blocks=4)
    facts = shorten(model, rows, remove=2, score="loss")
    left, rounds = [0, 1, 2, 3], []
    for _ in range(2):
        losses = {gone: loss_with(tiny_model, rows, [block for block in left if block != gone]) for gone in left}
        rounds.append({f"loss without block {gone}": pytest.approx(loss, abs=1e-6) for gone, loss in losses.items()})
        left.remove(min(losses, key=losses.get))
    assert facts["scores"] == rounds
    assert facts["dropped"] == sorted({0, 1, 2, 3} - set(left))
    assert mean_loss(model, encoded(model, rows)) == pytest.approx(loss_with(tiny_model, rows, left), abs=1e-6)
    assert model.network.config.num_hidden_layers == len(model.anatomy.blocks) == 2


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_angles_equal_those_between_what_enters_each_block(tiny_model, rows, family):
    model, sample = tiny_model(family, blocks=4), rows[::9]
    entered = []
    hooks = [
        block.module.register_forward_pre_hook(lambda _, given: entered[-1].append(given[0][0].double()))
        for block in model.anatomy.blocks
    ]
    with torch.no_grad():
        for row in sample:
            entered.append([])
            model.network(**model.tokenizer(row["text"], return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    facts = shorten(model, sample, remove=2, score="angular")
    for low in range(2):  # what leaves the last block enters none: the third candidate has no such reference
        cosine = torch.cat([torch.cosine_similarity(states[low], states[low + 2], dim=-1) for states in entered])
        expected = float(torch.arccos(cosine).mean() / math.pi)
        assert facts["scores"][0][f"angle over blocks {low}–{low + 1}"] == pytest.approx(expected, abs=1e-5)
    lowest = min(facts["scores"][0], key=facts["scores"][0].get)
    assert lowest == f"angle over blocks {facts['dropped'][0]}–{facts['dropped'][1]}"
    assert len(facts["scores"][0]) == 3
    assert len(model.anatomy.blocks) == 2


def test_blocks_that_do_nothing_are_found_by_angle(tiny_model, rows):
    model = tiny_model(blocks=4)
    modules = [block.module for block in model.anatomy.blocks]
    with torch.no_grad():
        for index in (1, 2):  # after a plain norm, adding nothing and norming again changes nothing
            for linear in (modules[index].attention.output.dense, modules[index].output.dense):
                linear.weight.zero_(), linear.bias.zero_()
            norms = (modules[0].output, modules[index].attention.output, modules[index].output)
            for norm in (part.LayerNorm for part in norms):
                norm.weight.fill_(1), norm.bias.zero_()
    facts = shorten(model, rows, remove=2, score="angular", rows=8)
    assert facts["dropped"] == [1, 2]
    assert facts["scores"][0]["angle over blocks 1–2"] < 1e-4


@pytest.mark.parametrize("remove", [0, -1, 3, 4])
def test_one_must_go_and_one_must_stay(tiny_model, rows, remove):
    with pytest.raises(ModelError, match=f"can't remove {remove} of 3 layers.*Give 1 to 2"):
        shorten(tiny_model(), rows, remove=remove)


def test_a_quantized_model_is_not_shortened(tiny_model, rows):
    model = tiny_model()
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        shorten(model, rows)
