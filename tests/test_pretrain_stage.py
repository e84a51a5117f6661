"""`pretrain` in a recipe: before the task, by a domain's file or by the task's own texts."""

import csv

import pytest

from moss_rlhf.checking import check, check_stages
from moss_rlhf.errors import DataError, RecipeError
from moss_rlhf.pipeline import run
from moss_rlhf.preparing import _folders
from moss_rlhf.recipe import make_recipe
from moss_rlhf.rundir import RunDirectory

pytestmark = pytest.mark.usefixtures("memory_not_measured")
QUICK = {"speed_seconds": 0.1, "speed_rows": 4, "batch_sizes": [1], "resamples": 200}


@pytest.fixture
def recipe(rows, tiny_checkpoint, tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "domain.txt").write_text("\n".join(row["text"] for row in rows[:30]))

    def build(*stages):
        return make_recipe(
            {
                "task": "text-classification",
                "model": str(tiny_checkpoint("bert")),
                "data": {"train": str(tmp_path / "train.csv")},
                "stages": list(stages),
                "evaluate": QUICK,
                "output": str(tmp_path / "run"),
            }
        )

    return build


SMALL = {"batch_size": 8, "max_length": 24, "learning_rate": 1e-3}


def test_domain_then_task_then_the_labels(recipe, tmp_path):
    stages = (
        {"pretrain": {"texts": str(tmp_path / "domain.txt"), **SMALL}},
        {"pretrain": {"texts": "task", "packed": False, **SMALL}},
        {"finetune": {"epochs": 1}},
    )
    report = run(recipe(*stages))
    domain, task, tuned = report["stages"]
    assert domain["kind"] == task["kind"] == "pretrain"
    assert domain["facts"]["texts"] == 30 and task["facts"]["texts"] == 54  # a tenth of 60 is validation
    assert domain["flops"] > 0 and domain["history"]["validation"][0]["perplexity"] > 1
    assert domain["facts"]["after"] != domain["facts"]["before"]
    assert tuned["history"]["validation"][0]["accuracy"] >= 0


def test_no_epoch_changes_nothing(recipe):
    report = run(recipe({"pretrain": {"epochs": 0}}, {"finetune": {"epochs": 1}}))
    left_out, tuned = report["stages"]
    assert left_out["flops"] == 0 and left_out["facts"]["steps"] == 0
    assert tuned["history"]["validation"]


def test_another_text_makes_it_another_stage(recipe, tmp_path):
    stages = recipe({"pretrain": {"texts": str(tmp_path / "domain.txt")}})
    place = RunDirectory(tmp_path / "run")
    before = [folder.fingerprint for folder in _folders(stages, place, "start")]
    assert before == [folder.fingerprint for folder in _folders(stages, place, "start")]
    (tmp_path / "domain.txt").write_text("other texts\nand more\n")
    assert before != [folder.fingerprint for folder in _folders(stages, place, "start")]


def test_pretraining_trains_no_head(recipe):
    """A parent whose head was never trained is no 'before', and no teacher."""
    report = run(recipe({"pretrain": SMALL}, {"prune": {"sparsity": 0.5}}))
    assert report["before"] is None


def test_what_check_finds(recipe, tiny_checkpoint, tmp_path):
    place = tiny_checkpoint("bert")
    with pytest.raises(DataError, match=r"stages\.0\.pretrain\.texts: there is no file"):
        check_stages(recipe({"pretrain": {"texts": str(tmp_path / "none.txt")}}), place)
    narrowed = recipe({"narrow": {"hidden": 0.25}}, "pretrain")
    with pytest.raises(RecipeError, match=r"stages\.1\.pretrain: the hidden size is narrowed before it"):
        check_stages(narrowed, place)
    found = check(recipe("pretrain", {"pretrain": {"texts": str(tmp_path / "domain.txt")}}))
    assert [stage.kind for stage in found.stages] == ["pretrain", "pretrain"]
    assert all(stage.flops > 0 for stage in found.stages)
