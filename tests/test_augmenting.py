"""Augmentation in a run: who trains on the copies, what the report says, stopped and run again, what is refused."""

import hashlib
import json
from pathlib import Path

import pytest

from moss_rlhf import pipeline, run
from moss_rlhf.checking import check
from moss_rlhf.errors import MachineError, ModelError, RecipeError
from moss_rlhf.recipe import make_recipe

pytestmark = pytest.mark.usefixtures("one_core", "memory_not_measured")
AUGMENT = {"copies": 2, "swap": 0.1, "delete": 0.1, "typo": 0.1, "punctuation": 0.3}


@pytest.fixture
def recipe(rows, tiny_checkpoint, tmp_path):
    for name, part in (("train", rows[:40]), ("test", rows[40:])):
        lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in part)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert", blocks=1)),
        "data": {
            "train": str(tmp_path / "train.csv"),
            "validation": 0.2,
            "test": str(tmp_path / "test.csv"),
            "augment": AUGMENT,
        },
        "stages": [{"finetune": {"epochs": 1, "batch_size": 8}}],
        "evaluate": {"batch_sizes": [1], "resamples": 200, "speed_seconds": 0.01},
        "output": str(tmp_path / "run"),
    }


def _with(recipe, **changes):
    return recipe | {"data": recipe["data"] | {"augment": AUGMENT | changes}}


def _weights(place):
    return hashlib.sha256((Path(place) / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_run_trains_on_the_copies_and_reports_them(recipe):
    report = run(recipe)
    train = report["data"]["train"]
    augmented = train["augmented"]
    assert augmented["rows"] == 2 * train["rows"]
    assert augmented["unchanged"] == 0
    assert (augmented["copies"], augmented["language"], augmented["use"]) == (2, "en", "always")
    assert augmented["operations"] == ["swap", "delete", "typo", "punctuation"]
    assert len(augmented["examples"]) == 5
    assert report["stages"][0]["facts"]["steps"] == -(-3 * train["rows"] // 8)
    assert "augmented" not in report["data"]["validation"]


def test_stopped_and_run_again_is_never_stopped(recipe, tmp_path, monkeypatch):
    first = run(recipe | {"output": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(recipe)
    copies = list((tmp_path / "run").rglob("*-copy?.arrow"))
    times = {place: place.stat().st_mtime_ns for place in copies}
    assert len(copies) == 2
    second = run(recipe)
    assert _weights(tmp_path / "run") == _weights(tmp_path / "whole")
    assert second["data"] == first["data"]
    assert second["fingerprint"] != ""
    assert {place: place.stat().st_mtime_ns for place in copies} == times, "made once"


def test_every_part_of_the_augmentation_names_the_stages(recipe, tmp_path):
    def first_stage(changed):
        session = _prepare(changed, tmp_path)
        return session.folders[0].path.name

    names = [
        first_stage(changed)
        for changed in (
            recipe,
            _with(recipe, copies=1),
            _with(recipe, swap=0.2),
            _with(recipe, combine="all"),
            recipe | {"seed": 1},
            recipe | {"data": {**recipe["data"], "augment": None}},
        )
    ]
    assert len(set(names)) == len(names)
    assert first_stage(_with(recipe, language="en")) == names[0], "the language that was found out anyway"


def test_copies_for_a_teacher_are_used_where_one_is(recipe, tmp_path):
    recipe = _with(recipe, use="distill") | {
        "stages": [{"finetune": {}}, {"narrow": {"heads": 0.5}}, {"finetune": {"distill": {}}}]
    }
    session = _prepare(recipe, tmp_path)
    plain, _, taught = (
        getattr(stage, kind)
        for stage, kind in zip(session.recipe.stages, ("finetune", "narrow", "finetune"), strict=True)
    )
    rows = session.rows_after(0)
    assert len(session.rows_to_train(plain, rows)) == len(rows.train)
    assert len(session.rows_to_train(taught, rows)) == 3 * len(rows.train)
    assert session.rows_to_train(taught, rows)[: len(rows.train)] == rows.train[:]


def test_the_forecast_counts_the_copies(recipe):
    alone = check(make_recipe(recipe | {"data": {**recipe["data"], "augment": None}}))
    with_copies = check(make_recipe(recipe))
    validation = alone.data.facts["validation"]["rows"] / alone.data.facts["train"]["rows"] / 3
    ratio = with_copies.stages[0].flops / alone.stages[0].flops
    assert 3 - 3 * validation < ratio < 3


def test_what_can_not_be_made_is_refused_before_any_work(recipe, monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("moss_rlhf.strategy.augmentation.synonyms._places", list)
    faults = [
        ({"synonym": 0.1}, MachineError, "python -m nltk.downloader wordnet"),
        ({"synonym": 0.1, "language": "zh"}, RecipeError, r"data\.augment\.synonym: the texts are Chinese"),
        ({"masked_lm": {"model": "./nowhere"}}, ModelError, "no directory"),
        ({"masked_lm": {"model": str(tiny_checkpoint("bert"))}}, ModelError, "masked language model"),
        ({"back_translation": {"to": str(tiny_checkpoint("bert")), "back": "x"}}, ModelError, "translates nothing"),
        ({"use": "distill"}, RecipeError, "use: always"),
    ]
    for changes, kind, message in faults:
        changed = _with(recipe, **changes)
        with pytest.raises(kind, match=message):
            check(make_recipe(changed))
        with pytest.raises(kind, match=message):
            run(changed)
        assert not list(Path(recipe["output"]).glob("stages/*/model"))


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ({}, "changes nothing"),
        ({"copies": 0, "swap": 0.1}, "greater than or equal to 1"),
        ({"swap": 0.6}, "less than or equal to 0.5"),
        ({"swop": 0.1}, "did you mean 'swap'"),
        ({"masked_lm": {"model": "m", "share": 1.0}}, "less than 1"),
        ({"masked_lm": {"model": "m", "top_k": 0}}, "greater than or equal to 1"),
        ({"copies": 2, "back_translation": {"to": "a", "back": "b"}}, "2 copies would be the same"),
        ({"swap": 0.1, "language": "fr"}, "language"),
    ],
)
def test_wrong_fields_are_refused(recipe, augment, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(recipe | {"data": recipe["data"] | {"augment": augment}})


def test_a_masked_model_in_a_recipe(recipe, tmp_path, tiny_checkpoint):
    import torch
    from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

    source, place = tiny_checkpoint("bert"), tmp_path / "masked"
    with torch.random.fork_rng(devices=[]):
        AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(place)
    AutoTokenizer.from_pretrained(source).save_pretrained(place)
    recipe["data"]["augment"] = {"masked_lm": {"model": str(place), "share": 0.3}}
    session = _prepare(recipe, tmp_path)
    facts = session.rows_after(0).facts["train"]["augmented"]
    assert facts["operations"] == ["masked_lm"]
    assert facts["unchanged"] == 0
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    (place / "config.json").write_text(json.dumps(config | {"note": "changed"}), encoding="utf-8")
    assert _prepare(recipe, tmp_path).folders[0].path.name != session.folders[0].path.name


def _prepare(recipe, tmp_path):
    from moss_rlhf.preparing import prepare
    from moss_rlhf.progress import Progress
    from moss_rlhf.rundir import open_run

    with open_run(Path(recipe["output"]), False) as place:
        return prepare(make_recipe(recipe), place, Progress(quiet=True), threads=1)
