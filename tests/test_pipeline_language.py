"""The whole story of a decoder and an encoder-decoder: from texts without labels to a measured CTranslate2 file."""

import numpy as np
import pytest

from moss_rlhf import run
from moss_rlhf.checking import check
from moss_rlhf.evaluation import translate
from moss_rlhf.model.runtime import open_ctranslate2
from moss_rlhf.recipe import make_recipe
from moss_rlhf.reporting import terminal_summary
from moss_rlhf.reporting.forecast import forecast_text
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded, load
from moss_rlhf.tasks.overlap import chrf

pytest.importorskip("ctranslate2")
pytestmark = pytest.mark.usefixtures("one_core", "memory_not_measured")
SPLITS = ("train", "test")
FAMILIES = {"text-generation": "gpt2", "translation": "t5"}
STAGES = [
    {"finetune": {"epochs": 2, "learning_rate": 3e-3}},
    {"narrow": {"heads": 0.5, "feed_forward": 0.3, "rows": 32}},
    {"finetune": {"epochs": 1, "learning_rate": 3e-3, "distill": {}}},
    "quantize",
]


def recipe_of(task, model, rows, place, stages=STAGES, **fields):
    for name, part in (("train", rows[:48]), ("test", rows[48:])):
        if task == "text-generation":
            (place / f"{name}.txt").write_text("\n\n".join(row["text"] for row in part))
        else:
            for column in ("source", "target"):
                (place / f"{name}.{column}").write_text("".join(row[column] + "\n" for row in part))
    paths = {name: {column: str(place / f"{name}.{column}") for column in ("source", "target")} for name in SPLITS}
    files = {name: {"files": paths[name]} for name in SPLITS}
    plain = {name: str(place / f"{name}.txt") for name in SPLITS}
    return {
        "task": task,
        "model": str(model),
        "data": {**(plain if task == "text-generation" else files), "validation": 0.2},
        "stages": stages,
        "evaluate": {"batch_sizes": [1, 4], "resamples": 200, "speed_seconds": 0.2},
        "export": ["ctranslate2"],
        "output": str(place / "run"),
    } | fields


@pytest.fixture(scope="module", params=FAMILIES)
def shipped(request, tiny_checkpoint, rows_of, tmp_path_factory):
    """(task, recipe, report, directory, rows of test)."""
    task, place = request.param, tmp_path_factory.mktemp(request.param)
    rows = rows_of(task)
    recipe = recipe_of(task, tiny_checkpoint(FAMILIES[task]), rows, place)
    return task, recipe, run(recipe), place / "run", rows[48:]


def test_what_is_measured_is_the_runtime_file(shipped):
    """The reported perplexity is that of the file's own answers, summed here anew."""
    task, _, report, place, rows = shipped
    after = report["after"]
    assert (after["artifact"], after["runtime"]) == ("ctranslate2/model.bin", "CTranslate2 int8")
    assert after["bytes"] == (place / "ctranslate2" / "model.bin").stat().st_size
    model = load(place / "model")
    ready = encoded(model, rows, int(report["data"]["test"]["tokens"]["max_length"]))
    runtime, total, count = open_ctranslate2(place / "ctranslate2", len(model.tokenizer)), 0.0, 0
    for row in ready:
        batch = {name: value.numpy() for name, value in TASKS[task].collate([row], model.tokenizer).items()}
        answers = runtime.run(batch)[0].astype(np.float64)
        if task == "text-generation":
            answers -= np.log(np.exp(answers).sum(axis=1, keepdims=True))
            total -= sum(answers[position, token] for position, token in enumerate(row["input_ids"][1:]))
            count += len(row["input_ids"]) - 1
        else:
            total -= answers.sum()
            count += len(row["labels"])
    assert after["metrics"]["perplexity"]["value"] == pytest.approx(
        np.exp(total / count), rel=1e-3
    )  # int8 depends on company
    assert after["rows"] == len(ready)


def test_the_gain_and_the_reference_are_those_of_the_measurements(shipped):
    _, _, report, place, _ = shipped
    before, after, gain = (report[side] for side in ("before", "after", "gain"))
    assert (before["runtime"], report["reference"]["runtime"]) == ("PyTorch float32", "CTranslate2 float32")
    assert before["artifact"].startswith("stages/01-finetune")
    name = "perplexity" if report["task"] == "text-generation" else "bleu"
    assert gain["metric"]["name"] == name
    assert gain["metric"].get("lower_is_better", False) == (name == "perplexity")
    delta = after["metrics"][name]["value"] - before["metrics"][name]["value"]
    assert gain["metric"]["delta"] == pytest.approx(delta)
    assert gain["speedup"].keys() == {"1", "4"}
    assert gain["size"] > 1
    assert not (place / "work").exists()


def test_what_a_translators_file_can_not_tell_is_left_out_and_said(shipped):
    task, _, report, _, _ = shipped
    written = set() if task == "text-generation" else {"bleu", "chrf"}
    told = {"perplexity", "token_accuracy"} if task == "text-generation" else {"perplexity"}
    assert set(report["after"]["metrics"]) == told | written
    assert set(report["before"]["metrics"]) == {"perplexity", "token_accuracy"} | written
    said = [note for note in report["notes"] if "there is no token accuracy of after" in note]
    assert len(said) == (task == "translation")


def test_translations_are_those_that_the_shipped_file_writes(shipped):
    task, _, report, place, rows = shipped
    if task == "text-generation":
        assert report["rewritten"] == []
        return
    model = load(place / "model")
    runtime = open_ctranslate2(place / "ctranslate2", model.network.config.vocab_size)
    ready = encoded(model, rows)
    found = translate(model, runtime, ready, [row["target"] for row in rows])
    assert report["after"]["translated"] == len(rows)
    assert report["after"]["metrics"]["chrf"]["value"] == pytest.approx(float(chrf(found.likeness.sum(axis=0))))
    by_source = {row["source"]: text for row, text in zip(rows, found.texts, strict=True)}
    for row in report["rewritten"]:
        assert row["after"] == by_source[row["source"]] != row["before"]


def test_training_learned(shipped):
    """A tiny random model knows nothing; two epochs bring the perplexity below that of the untrained."""
    _, recipe, report, _, _ = shipped
    first = report["stages"][0]
    assert first["history"]["validation"][-1]["perplexity"] < first["history"]["validation"][0]["perplexity"]
    assert report["stages"][2]["facts"]["best_validation_perplexity"] > 1
    assert recipe["task"] == report["task"]


def test_the_page_and_the_summary(shipped):
    task, _, report, place, _ = shipped
    summary = terminal_summary(report)
    assert ("perplexity" if task == "text-generation" else "BLEU") in summary
    assert "ctranslate2/model.bin, CTranslate2 int8" in summary
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "CTranslate2 float32" in page
    assert ("Translations that changed the most" in page) == bool(report["rewritten"])
    assert "not measured" in page or task == "text-generation"
    assert report["data"]["train"].keys() >= {"rows", "dropped", "layout", "tokens"}
    assert "classes" not in report["data"]["train"]
    assert report["moved"][0].keys() == {"text", "before", "after"}


def test_run_again_it_is_finished_and_check_foretells_it(shipped, tmp_path):
    _, recipe, report, _, _ = shipped
    assert run(recipe) == report
    found = check(make_recipe(recipe | {"output": str(tmp_path / "other")}))
    assert [stage.parameters for stage in found.stages][:1] == [report["stages"][0]["measurement"]["parameters"]]
    text = forecast_text(found)
    assert "labels" not in text
    assert text.endswith("ok")
    assert found.data.facts["test"]["rows"] == 12


def test_without_training_the_source_is_before(tiny_checkpoint, rows_of, tmp_path):
    """A language model's head is trained already: compressed alone, it is compared with itself."""
    stages = [{"prune": {"sparsity": 0.5, "method": "wanda", "rows": 16}}]
    model, rows = tiny_checkpoint("llama"), rows_of("text-generation")
    report = run(recipe_of("text-generation", model, rows, tmp_path, stages, export=[]))
    assert report["gain"]["metric"]["delta"] == pytest.approx(
        report["after"]["metrics"]["perplexity"]["value"] - report["before"]["metrics"]["perplexity"]["value"]
    )
    assert report["before"]["artifact"] == str(model)
    assert report["after"]["nonzero"] < report["before"]["nonzero"]
