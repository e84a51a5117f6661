"""Sensitivity against closed forms, and what allocates by it by hand."""

import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError
from moss_rlhf.optimization.sensitivity import loss_damage, sparsities_by_damage
from moss_rlhf.recipe.compression import SPARSITIES


def test_the_damage_is_half_the_gradient_weighted_change_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    change = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    gradient = torch.rand(5, generator=generator, dtype=torch.float64)
    by_hand = 0.5 * ((inputs @ change.T).square().mean(dim=0) * gradient).sum()
    found = loss_damage(change, inputs.T @ inputs, 50, gradient)
    assert found == pytest.approx(float(by_hand), rel=1e-12)


def test_the_cheapest_steps_are_taken_first_and_the_mean_is_met():
    cheap, dear = {"0.5": 1.0, "0.9": 10.0}, {"0.5": 4.0, "0.9": 100.0}
    assert sparsities_by_damage([cheap, dear], [10, 10], 0.25) == pytest.approx([0.5, 0.0])
    assert sparsities_by_damage([cheap, dear], [10, 10], 0.5) == pytest.approx([0.5, 0.5])
    assert sparsities_by_damage([cheap, dear], [10, 30], 0.35) == pytest.approx(
        [0.5, 0.3]
    )  # a weight of `dear` costs less
    with pytest.raises(ValueError, match="more than the curves reach"):
        sparsities_by_damage([cheap, dear], [10, 10], 0.95)


@pytest.mark.parametrize("family", ["bert", "albert", "llama", "t5"])
def test_every_block_and_matrix_is_scored_and_nothing_is_changed(family, tiny_model, rows_of, tmp_path):
    model, untouched = tiny_model(family), tiny_model(family)
    facts = moss_rlhf.sensitivity(model, rows_of(model.task), rows=16)
    pairs = zip(model.network.parameters(), untouched.network.parameters(), strict=True)
    assert all(torch.equal(new, old) for new, old in pairs)
    table = facts["table"]
    assert list(table["matrices"]) == [matrix.name for matrix in model.anatomy.matrices]
    for scores in table["matrices"].values():
        curve = [scores["prune"][str(sparsity)] for sparsity in SPARSITIES]
        assert 0 <= curve[0] < curve[-1]  # not always rising in between: errors may cancel
        assert scores["bits"]["8"] < scores["bits"]["4"] < scores["bits"]["2"]
    for block in model.anatomy.blocks:
        scores = table["blocks"][block.name]
        assert len(scores["heads"]) == block.attention.units
        assert len(scores["feed_forward"]) == block.feed_forward.width
    moss_rlhf.save(model, tmp_path / "saved")
    assert moss_rlhf.load(tmp_path / "saved").sensitivity == table


def test_a_block_that_gives_nothing_loses_nothing(tiny_model, rows_of):
    model = tiny_model("llama")
    block = model.anatomy.blocks[1]
    for matrix in (block.attention.output, block.feed_forward.down):
        matrix.weight.zero_()
    facts = moss_rlhf.sensitivity(model, rows_of("text-generation"), rows=16)
    found = facts["table"]["blocks"]["block.1"]
    assert found["drop"] == pytest.approx(0, abs=1e-12)  # pre-norm: the input goes through as it is
    assert found["prune"]["0.5"] == 0
    assert sum(found["heads"]) == sum(found["feed_forward"]) == 0
    assert facts["most_sensitive_first"][-1] == "block.1"


def test_a_quantized_model_is_refused(tiny_model, rows):
    model = tiny_model()
    moss_rlhf.quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        moss_rlhf.sensitivity(model, rows)
