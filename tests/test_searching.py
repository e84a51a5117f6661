"""Search: it finds, it stops what is hopeless, it goes on where it stopped, and it never looks at the test split."""

import csv
import math
from pathlib import Path

import pytest
import yaml

from moss_rlhf.errors import MossError, RecipeError, UserError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import make_recipe, with_values
from moss_rlhf.reporting.search import terminal_line, winner_in_words
from moss_rlhf.searching import Measured, mean_interval, search

RATE = "stages.0.finetune.learning_rate"
BASE = {
    "task": "text-classification",
    "model": "model",
    "data": {"train": "train.csv"},
    "stages": [{"finetune": {"epochs": 2, "learning_rate": 1e-3}}],
}
QUIET = Progress(quiet=True)
pytestmark = pytest.mark.usefixtures("memory_not_measured")


def _recipe(**search_fields):
    space = {RATE: {"low": 1e-5, "high": 1e-1, "log": True}, "stages.0.finetune.epochs": [1, 2]}
    return make_recipe(BASE | {"search": {"space": space, "trials": 12, "seeds": 2} | search_fields})


def _accuracy(recipe, metric, progress):
    """Best at a rate of 1e-3 and two epochs; the seed moves it a little. One evaluation an epoch."""
    spec = recipe.stages[0].finetune
    value = 1 - 0.1 * abs(math.log10(spec.learning_rate) + 3) - 0.05 * (spec.epochs == 1) + 1e-3 * recipe.seed
    progress.event("stage started", name="01-finetune-aaaa")
    for epoch in range(spec.epochs):
        progress.event("evaluated", step=epoch, accuracy=value - 0.01 * (spec.epochs - 1 - epoch))
    folder = Path(recipe.output) / "stages" / f"01-{spec.learning_rate}-{spec.epochs}-{recipe.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    return Measured(value, (folder,))


def _search(recipe, folder, measure=_accuracy):
    return search(recipe, recipe.search, measure, folder, QUIET)


def _values(found):
    return [(trial["values"], trial["value"]) for trial in found.facts["trials"]]


def test_it_finds_the_best_and_trains_it_again(tmp_path):
    found = _search(_recipe(stop_bad=False), tmp_path)
    trials = found.facts["trials"]
    best = max(trials, key=lambda trial: trial["value"])
    spec = found.recipe.stages[0].finetune
    assert {RATE: spec.learning_rate, "stages.0.finetune.epochs": spec.epochs} == best["values"]
    assert len(trials) == 12
    assert best["value"] > 0.9
    assert found.recipe.search is None
    assert found.facts["winner"]["values"] == pytest.approx([best["value"] + 1e-3, best["value"] + 2e-3])


def test_trials_on_a_part_and_the_winner_on_all(tmp_path):
    seen = []

    def counting(recipe, metric, progress):
        seen.append(recipe.data.limit)
        measured = _accuracy(recipe, metric, progress)
        return Measured(measured.value, measured.folders, flops=10.0)

    base = make_recipe(BASE | {"data": {"train": "train.csv", "limit": 500}})
    recipe = with_values(base, {"search": {"space": {RATE: [1e-3]}, "trials": 2, "seeds": 1, "rows": 50}})
    found = _search(recipe, tmp_path, counting)
    assert seen == [{"train": 50, "validation": 500, "test": 500}] * 2 + [500]
    assert found.recipe.data.limit == 500
    assert found.facts["flops"] == 30.0 and found.facts["rows"] == 50


def test_a_winner_that_is_not_trained_again_has_no_interval(tmp_path):
    found = _search(_recipe(trials=2, seeds=0), tmp_path)
    assert found.facts["winner"] is None
    assert "It was not trained again" in winner_in_words(found.facts)
    assert "again" not in terminal_line(found.facts)


def test_more_trials_may_find_another_winner_which_is_trained_again_itself(tmp_path):
    few, many = _recipe(stop_bad=False, trials=1), _recipe(stop_bad=False, trials=12)
    first, second = _search(few, tmp_path), _search(many, tmp_path)
    assert first.recipe != second.recipe
    best = max(trial["value"] for trial in second.facts["trials"])
    assert second.facts["winner"]["values"] == pytest.approx([best + 1e-3, best + 2e-3])
    assert second.facts == _search(many, tmp_path).facts


def test_pretrainings_accuracy_of_masked_words_ends_no_trial(tmp_path):
    def pretraining_first(recipe, metric, progress):
        progress.event("stage started", name="01-pretrain-aaaa")
        progress.event("evaluated", step=0, accuracy=-recipe.stages[0].finetune.learning_rate)
        return _accuracy(recipe, metric, Progress(quiet=True))

    found = _search(_recipe(stop_bad=True), tmp_path, pretraining_first)
    assert {trial["state"] for trial in found.facts["trials"]} == {"done"}


def test_only_the_best_trials_stages_stay(tmp_path):
    found = _search(_recipe(stop_bad=False), tmp_path)
    spec = found.recipe.stages[0].finetune
    (stage,) = (tmp_path / "worker-0" / "stages").iterdir()
    assert stage.name == f"01-{spec.learning_rate}-{spec.epochs}-0"


def test_a_seed_gives_the_same_trials(tmp_path):
    first, second = (_search(_recipe(), tmp_path / name) for name in "ab")
    assert _values(first) == _values(second)
    other = _recipe().model_copy(update={"seed": 1})
    assert _values(_search(other, tmp_path / "c")) != _values(first)


@pytest.mark.parametrize("after", [1, 6, 11])
def test_killed_and_resumed_is_never_stopped(after, tmp_path):
    calls = []

    def dying(recipe, metric, progress):
        calls.append(recipe)
        if len(calls) == after:
            progress.event("stage started", name="01-finetune-aaaa")
            progress.event("evaluated", step=0, accuracy=0.5)
            raise KeyboardInterrupt
        return _accuracy(recipe, metric, progress)

    recipe = _recipe(stop_bad=False)
    with pytest.raises(KeyboardInterrupt):
        _search(recipe, tmp_path / "killed", dying)
    resumed = _search(recipe, tmp_path / "killed")
    assert resumed.facts == _search(recipe, tmp_path / "whole").facts


def test_a_hopeless_trial_is_stopped(tmp_path):
    states = [trial["state"] for trial in _search(_recipe(trials=25), tmp_path).facts["trials"]]
    assert "stopped" in states
    assert set(states) <= {"done", "stopped"}


def test_a_failed_trial_fails_alone(tmp_path):
    def failing(recipe, metric, progress):
        if recipe.stages[0].finetune.epochs == 1:
            raise UserError("the loss became nan")
        return _accuracy(recipe, metric, progress)

    found = _search(_recipe(stop_bad=False), tmp_path, failing)
    whys = {trial["why"] for trial in found.facts["trials"] if trial["state"] == "failed"}
    assert whys == {"the loss became nan"}
    assert found.recipe.stages[0].finetune.epochs == 2


def test_nothing_that_works_is_an_error(tmp_path):
    def failing(recipe, metric, progress):
        raise UserError("the loss became nan")

    with pytest.raises(MossError, match="none of 3 trials came to an end: the loss became nan"):
        _search(_recipe(trials=3), tmp_path, failing)


def test_another_search_into_the_same_folder_is_another_study(tmp_path):
    _search(_recipe(trials=3), tmp_path)
    found = _search(make_recipe(BASE | {"search": {"space": {RATE: [1e-3, 1e-4]}, "trials": 2, "seeds": 1}}), tmp_path)
    assert len(found.facts["trials"]) == 2


def test_other_rows_under_the_same_name_are_another_study(tiny_checkpoint, rows, tmp_path, monkeypatch):
    """What the trials came to on other rows is nothing to compare with; the same rows are not tried again."""
    from moss_rlhf.pipeline import on_validation

    seen = []

    def counting(recipe, metric, progress):
        seen.append(recipe.output)
        return on_validation(recipe, metric, progress)

    monkeypatch.setattr("moss_rlhf.pipeline.on_validation", counting)
    recipe = _real_recipe(tiny_checkpoint, rows, tmp_path, seeds=0)
    for trials, label in ((2, None), (2, None), (4, "negative")):
        if label:
            with (tmp_path / "train.csv").open("a", encoding="utf-8", newline="") as file:
                csv.writer(file).writerow(["a text that came later", label])
        _run(recipe)
        assert len(seen) == trials


def test_interval_by_hand():
    # s = 0.02, t(0.975, 2) = 4.302653, √3
    found = mean_interval([0.88, 0.90, 0.92])
    assert found["mean"] == pytest.approx(0.90)
    assert found["high"] - found["mean"] == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-6)
    assert mean_interval([0.5]) == {"mean": 0.5, "low": None, "high": None}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"stages.0.finetune.lerning_rate": [1e-4]}, r"search\.space.*lerning_rate.*did you mean 'learning_rate'"),
        ({"stages.3.finetune.epochs": [1]}, r"'3' is no position in a list of 1"),
        ({RATE: [1e-4, -1]}, r"-1 can't be tried"),
        ({"data.test": ["other.csv"]}, r"data\.test is not to be searched"),
        ({"seed": [1, 2]}, r"seed is not to be searched"),
        ({RATE: {"low": 1e-3, "high": 1e-4}}, "a range goes from low up to high"),
        ({RATE: {"low": 0, "high": 1e-4, "log": True}}, "with log from above 0"),
        ({RATE: []}, "at least 1 item"),
        ({}, "at least 1 item"),
    ],
)
def test_a_space_that_can_not_be_searched_is_refused_at_once(space, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(BASE | {"search": {"space": space}})


def _run(recipe):
    """Imports PyTorch here: the processes that trials get import this file, and need none."""
    from moss_rlhf.pipeline import run

    return run(recipe)


def _real_recipe(tiny_checkpoint, rows, tmp_path, seeds):
    for name, part in (("train", rows[:48]), ("test", rows[48:])):
        with (tmp_path / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)
    return {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert")),
        "data": {"train": str(tmp_path / "train.csv"), "validation": 0.3, "test": str(tmp_path / "test.csv")},
        "stages": [{"finetune": {"epochs": 1, "batch_size": 8, "precision": "float32"}}],
        "search": {"space": {RATE: [1e-5, 3e-3]}, "trials": 2, "seeds": seeds},
        "evaluate": {"speed_seconds": 0.1, "speed_rows": 4, "batch_sizes": [1]},
        "output": str(tmp_path / "run"),
    }


def test_a_real_search_looks_at_validation_alone(tiny_checkpoint, rows, tmp_path, monkeypatch):
    """And ends with the report of the winner; run again, nothing is done twice."""
    recipe = _real_recipe(tiny_checkpoint, rows, tmp_path, seeds=2)
    from moss_rlhf.measuring import Measuring

    seen = []
    quality = Measuring.quality

    def spy(self, artifact):
        seen.append(self.split)
        return quality(self, artifact)

    monkeypatch.setattr(Measuring, "quality", spy)
    report = _run(recipe)
    first_test = seen.index("test")
    assert len(seen[:first_test]) == 2 + 2 + 1  # trials, the winner again, the last training
    assert len(report["search"]["trials"]) == 2
    assert len(report["search"]["winner"]["values"]) == 2
    assert yaml.safe_load((tmp_path / "run" / "search" / "best.yaml").read_text())["seed"] == 0
    seen.clear()
    assert _run(recipe)["search"] == report["search"]
    assert seen == []


def test_trials_share_what_frozen_blocks_give(tiny_checkpoint, rows, tmp_path, monkeypatch):
    """Rows run through the blocks once for three trials, once for the winner again, and once for the run itself."""
    from moss_rlhf.finetuning import prefix_cache

    recipe = _real_recipe(tiny_checkpoint, rows, tmp_path, seeds=1)
    training = {"batch_size": 8, "precision": "float32", "cache": "required"}
    recipe["stages"] = [{"finetune": training | {"phases": [{"train": ["head"], "epochs": 2}]}}]
    recipe["search"] |= {"space": {RATE: [1e-4, 1e-3, 1e-2]}, "trials": 3}
    filled = []
    fill = prefix_cache.PrefixCache._fill

    def spy(self, store, prefix, missing):
        filled.append(len(missing))
        return fill(self, store, prefix, missing)

    monkeypatch.setattr(prefix_cache.PrefixCache, "_fill", spy)
    report = _run(recipe)
    trials = [trial["state"] for trial in report["search"]["trials"]]
    assert trials == ["done"] * 3
    assert filled == [filled[0], 0, 0, filled[0], filled[0]]
    assert filled[0] > 30
    assert not list((tmp_path / "run" / "search").glob("*/prefix"))


def test_trials_in_processes_of_their_own(tmp_path):
    found = _search(_recipe(trials=3, parallel=2, stop_bad=False), tmp_path)
    assert [trial["state"] for trial in found.facts["trials"]] == ["done"] * 3
