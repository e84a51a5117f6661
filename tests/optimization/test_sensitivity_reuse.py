"""A saved table serves the network that it was measured on, and no other."""

from importlib import import_module

import pytest
import torch

import moss_rlhf
from moss_rlhf.model.damage import block_damage


def same_weights(one, other):
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def refuse_passes(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(import_module("moss_rlhf.optimization.sensitivity"), "_gradients", refused)


def test_a_saved_table_serves_every_new_budget_without_new_passes(tiny_model, rows, tmp_path, monkeypatch):
    model = tiny_model()
    moss_rlhf.sensitivity(model, rows, rows=16)
    moss_rlhf.save(model, tmp_path / "saved")
    refuse_passes(monkeypatch)
    for do in (
        lambda model: moss_rlhf.prune(model, rows, sparsity=0.4, allocation="sensitivity", rows=16),
        lambda model: moss_rlhf.narrow(model, rows, heads=0.5, score="sensitivity", rows=16),
        lambda model: moss_rlhf.shorten(model, rows, remove=1, score="sensitivity", rows=16),
    ):
        assert do(moss_rlhf.load(tmp_path / "saved"))["sensitivity"].startswith("read from the saved table")


def test_saved_scores_choose_as_fisher_without_rearranging(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(import_module("moss_rlhf.optimization.narrow"), "rearrange", lambda gradients, kept: kept)
    models = [tiny_model(), tiny_model()]
    shares = {"heads": 0.5, "feed_forward": 0.3, "rows": 32}
    moss_rlhf.sensitivity(models[0], rows, rows=32)
    facts = [
        moss_rlhf.narrow(model, rows, **shares, score=score)
        for model, score in zip(models, ("sensitivity", "fisher"), strict=True)
    ]
    assert same_weights(*models)
    assert facts[0]["damage"] == pytest.approx(facts[1]["damage"], rel=1e-4)  # in the same units, of the loss
    assert block_damage(models[1].sensitivity) == facts[1]["damage"]  # without a table, too


def test_after_surgery_the_table_is_measured_anew_as_if_there_were_none(tiny_model, rows, tmp_path):
    """sensitivity → narrow → shorten = narrow, then sensitivity and shorten."""
    models = [tiny_model(), tiny_model()]
    for model in models:
        moss_rlhf.sensitivity(model, rows, rows=16)
        moss_rlhf.narrow(model, rows, heads=0.5, score="sensitivity", rows=16)
    models[1].sensitivity = None
    moss_rlhf.sensitivity(models[1], rows, rows=16)
    facts = [moss_rlhf.shorten(model, rows, remove=1, score="sensitivity", rows=16) for model in models]
    assert "before it was changed" in facts[0]["sensitivity"]
    assert facts[1]["sensitivity"].startswith("read")
    assert facts[0]["dropped"] == facts[1]["dropped"]
    assert facts[0]["scores"] == facts[1]["scores"]
    assert same_weights(*models)
    moss_rlhf.save(models[0], tmp_path / "saved")
    again = moss_rlhf.load(tmp_path / "saved")
    blocks = again.anatomy.blocks
    assert list(block_damage(again.sensitivity)) == [block.name for block in blocks]
    for block in blocks:
        found = again.sensitivity["blocks"][block.name]
        assert (len(found["heads"]), len(found["feed_forward"])) == (block.attention.units, block.feed_forward.width)


def test_the_least_influential_block_of_the_table_goes(tiny_model, rows):
    model = tiny_model()
    table = moss_rlhf.sensitivity(model, rows, rows=16)["table"]["blocks"]
    least = min(table, key=lambda name: table[name]["drop"])
    facts = moss_rlhf.shorten(model, rows, remove=1, score="sensitivity", rows=16)
    assert facts["dropped"] == [int(least.removeprefix("block."))]


def test_training_outdates_a_table(tiny_model, rows):
    model = tiny_model()
    moss_rlhf.sensitivity(model, rows, rows=16)
    model.anatomy.blocks[0].attention.output.weight.add_(0.01)
    facts = moss_rlhf.prune(model, rows, sparsity=0.4, allocation="sensitivity", rows=16)
    assert facts["sensitivity"].startswith("measured on 16 rows first")


def test_a_matrix_that_an_allocation_spares_is_not_listed_as_pruned(tiny_model, rows, tmp_path):
    """Its share is 0; a tensor listed without zeros could not be saved."""
    model = tiny_model()
    moss_rlhf.sensitivity(model, rows, rows=16)
    matrices = model.sensitivity["matrices"]
    spared = next(iter(matrices))
    matrices[spared]["prune"] = {level: 1e6 * float(level) for level in matrices[spared]["prune"]}
    moss_rlhf.prune(model, rows, sparsity=0.2, allocation="sensitivity", rows=16)
    moss_rlhf.save(model, tmp_path / "saved")
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    assert spared not in {names[id(parameter)] for parameter in model.pruned}


def test_every_method_says_what_it_removed_measured_and_whether_it_is_faster(tiny_model, rows):
    facts = {
        "sensitivity": moss_rlhf.sensitivity(tiny_model(), rows, rows=16),
        "narrow": moss_rlhf.narrow(tiny_model(), rows, heads=0.5, rows=16),
        "shorten": moss_rlhf.shorten(tiny_model(), rows, rows=16),
        "prune": moss_rlhf.prune(tiny_model(), sparsity=0.5),
        "quantize": moss_rlhf.quantize(tiny_model()),
        "trim_vocabulary": moss_rlhf.trim_vocabulary(tiny_model(), rows),
    }
    for name, found in facts.items():
        assert found["removed"], name
        assert found["measured"], name
        assert found["faster_here"].startswith(("yes", "no", "somewhat", "a little")), name
    for name in ("narrow", "shorten"):
        assert " ms in PyTorch" in facts[name]["measured"]
