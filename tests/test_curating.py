"""A run that cleans, balances and reads long texts in windows: what it lists, measures, ships and serves agree."""

import csv
import json

import numpy as np
import pytest

from moss_rlhf.curating import TextVectors, cleaning_effect, curate
from moss_rlhf.data import Column, load_splits
from moss_rlhf.data.cleaning import clean_splits
from moss_rlhf.errors import DataError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CleanSpec, DataSpec
from moss_rlhf.rundir import RunDirectory

pytest.importorskip("sklearn")
pytestmark = pytest.mark.usefixtures("memory_not_measured")
COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, rows, tmp_path_factory):
    """(directory, report, recipe)."""
    from moss_rlhf import run

    place = tmp_path_factory.mktemp("curated")
    planted = [
        {"text": "?!", "label": "negative"},
        {"text": rows[0]["text"] + " <br />", "label": rows[0]["label"]},
        dict(rows[5]),
        {"text": rows[8]["text"], "label": "negative" if rows[8]["label"] == "positive" else "positive"},
    ]
    for name, part in (("train", [*rows[:44], *planted]), ("test", rows[44:])):
        with (place / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(part)
    recipe = {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert")),
        "data": {
            "train": str(place / "train.csv"),
            "validation": 0.2,
            "test": str(place / "test.csv"),
            "max_length": 8,
            "truncation": "windows",
            "balance": "oversample",
            "clean": {
                "empty": "drop",
                "markup": "mend",
                "duplicates": "drop",
                "conflicts": "drop",
                "label_errors": "flag",
                "ablate": True,
            },
        },
        "stages": [{"finetune": {"epochs": 1, "learning_rate": 1e-3}}],
        "evaluate": {"batch_sizes": [1], "resamples": 200, "speed_seconds": 0.1},
        "export": ["onnx"],
        "output": str(place / "run"),
    }
    return place / "run", run(recipe), recipe


def test_findings_stand_in_report_file_and_page(finished):
    place, report, _ = finished
    with (place / "findings.csv").open(encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    for split, facts in report["data"].items():
        for check, found in facts.get("findings", {}).items():
            assert found["count"] == sum(row["split"] == split and row["check"] == check for row in listed)
    every = {row["check"] for row in listed}
    assert every >= {"empty", "markup", "conflicts"}
    page = (place / "report.html").read_text("utf-8")
    assert "What cleaning found" in page
    assert "0 letters and digits" in page
    assert "A logistic regression on embeddings reaches" in page


def test_train_is_balanced_and_the_effect_was_measured(finished):
    _, report, _ = finished
    train = report["data"]["train"]
    assert len(set(train["classes"].values())) == 1
    assert train["rows"] == sum(train["classes"].values())
    effect = train["cleaning_effect"]
    assert effect["delta"] == pytest.approx(effect["cleaned_accuracy"] - effect["raw_accuracy"])
    assert effect["low"] <= effect["delta"] <= effect["high"]


def test_windows_are_measured_as_texts_and_served_alike(finished, rows):
    from moss_rlhf.serving import Predictor

    place, report, _ = finished
    assert report["after"]["rows"] == len(rows[44:])
    for folder in ("model", "onnx"):
        config = json.loads((place / folder / "config.json").read_text("utf-8"))
        assert config["moss_rlhf"]["cut"] == {"keep": "windows", "max_length": 8}
        answers = list(Predictor.open(place / folder).predict([row["text"] for row in rows[44:]]))
        right = np.mean([answer.label == row["label"] for answer, row in zip(answers, rows[44:], strict=True)])
        assert right == pytest.approx(report["after"]["metrics"]["accuracy"]["value"])


def test_going_on_does_nothing_anew(finished):
    from moss_rlhf import run

    place, report, recipe = finished
    vectors = next((place / "data").glob("vectors-*.npz")).stat().st_mtime_ns
    assert run(recipe) == report
    assert next((place / "data").glob("vectors-*.npz")).stat().st_mtime_ns == vectors


def test_a_text_is_embedded_once_and_kept(tiny_model, tmp_path):
    opened = []

    def open_model():
        opened.append(1)
        return tiny_model()

    first = TextVectors(tmp_path / "v.npz", open_model, QUIET)
    vectors = first(["good film", "bad film", "good film"])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    again = TextVectors(tmp_path / "v.npz", open_model, QUIET)
    np.testing.assert_array_equal(again(["bad film"]), vectors[1:2])
    assert opened == [1]
    again(["awful"])
    assert opened == [1, 1]


def test_the_effect_of_dropping_turned_labels_is_a_gain(tmp_path):
    """Three clouds, one of them turned in train: without those rows the probe gets more of it right."""
    generator = np.random.default_rng(0)
    corners = {"a": (3, 0), "b": (-3, 0), "c": (0, 3)}  # texts of the corner c are truly of label x
    points, rows = [], {"train": [], "validation": []}
    for split, count in (("train", 40), ("validation", 15)):
        for corner, centre in corners.items():
            for _ in range(count):
                label = {"a": "x", "b": "y", "c": "y" if split == "train" else "x"}[corner]
                rows[split].append((f"{'?' * (corner == 'c' and split == 'train')} {len(points)}", label))
                points.append(generator.normal(size=2) * 0.3 + centre)
    vectors = np.array(points) / np.linalg.norm(points, axis=1, keepdims=True)
    files = {}
    for split, part in rows.items():
        path = tmp_path / f"{split}.tsv"
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in part), "utf-8")
        files[split] = str(path)
    splits = load_splits(DataSpec(**files), COLUMNS, seed=0, cache=tmp_path / "cache", progress=QUIET)

    def embed(texts):
        return vectors[[int(text.split()[-1]) for text in texts]].astype(np.float32)

    # the turned rows are known by a tag
    marked = splits.train.map(lambda row: {"text": row["text"].replace("?", "<br>")})
    import dataclasses

    splits = dataclasses.replace(splits, train=marked)
    cleaned = clean_splits(splits, COLUMNS, CleanSpec(markup="drop"), seed=0, embed=embed, progress=QUIET)
    assert len(cleaned.splits.train) == 80
    effect = cleaning_effect(splits, cleaned, COLUMNS, embed, seed=0)
    assert effect["raw_accuracy"] == pytest.approx(2 / 3, abs=0.05)
    assert effect["cleaned_accuracy"] > 0.8
    assert effect["low"] > 0


# --- collecting ------------------------------------------------------------------------------------------------------


@pytest.fixture
def curated(rows, tiny_model, tmp_path):
    """`curated(model=None, **collect)` → (splits before, splits after, the run's directory)."""
    path, place = tmp_path / "rows.jsonl", RunDirectory(tmp_path / "run")
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")

    def build(open_model=tiny_model, clean=None, **collect):
        spec = DataSpec(train=str(path), validation=0.2, collect=collect, clean=clean)
        splits = load_splits(spec, COLUMNS, seed=0, cache=place.data, progress=QUIET)
        after = curate(
            splits, COLUMNS, spec, seed=0, place=place, source="s" * 64, open_model=open_model, progress=QUIET
        )
        return splits, after, place

    return build


def _every(splits):
    return [*splits.train["text"], *splits.validation["text"]]


def _no_model():
    raise AssertionError("no text had to be embedded")


def test_a_recipe_chooses_as_collect_does(curated, rows, tiny_model, tmp_path):
    from moss_rlhf import collect

    asked = {"count": 12, "like": [rows[0]["text"], rows[33]["text"]], "diversity": 0.4}
    before, after, _ = curated(**asked)
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(_every(before)), "utf-8")
    found = collect(file, model=tiny_model(), **asked)
    assert sorted(row["text"] for row in found) == sorted(_every(after))
    assert len(after.train) + len(after.validation) == 12


def test_words_choose_without_a_model_and_cleaning_comes_after(curated):
    before, after, place = curated(
        _no_model, clean={"length": "flag"}, count=50, keywords=["hotel", "film"], diversity=0
    )
    assert sorted(_every(after)) == sorted(text for text in _every(before) if {"hotel", "film"} & set(text.split()))
    with place.collected.open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == len(_every(after)) == 12
    assert after.facts["train"]["collected"]["by"] == "keywords (hotel, film)"
    assert "findings" in after.facts["train"]


def test_a_choice_is_kept_and_another_is_made_for_other_words(curated, rows):
    asked = {"count": 20, "like": [rows[0]["text"]]}
    _, first, place = curated(**asked)
    place.collected.unlink()
    _, again, _ = curated(_no_model, **asked)
    assert again.digest == first.digest
    assert again.facts == first.facts
    assert place.collected.exists()
    _, other, _ = curated(**asked | {"count": 19})
    assert other.digest != first.digest


def test_perplexity_chooses(curated, tiny_checkpoint, tiny_model, rows):
    from moss_rlhf.tasks.collecting import text_perplexities

    values = text_perplexities(tiny_model("gpt2"), [row["text"] for row in rows])
    least = [rows[place]["text"] for place in np.argsort(values)[:30]]
    _, after, _ = curated(_no_model, count=30, perplexity=str(tiny_checkpoint("gpt2")), diversity=0)
    assert sorted(_every(after)) == sorted(least)


def test_a_choice_of_nothing_says_so(curated):
    with pytest.raises(DataError, match=r"^data\.collect: no text fits\. Give other keywords"):
        curated(_no_model, count=5, keywords=["zebra"], diversity=0)


def test_a_run_collects_lists_and_goes_on(tiny_checkpoint, rows, tmp_path):
    from moss_rlhf import run

    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    recipe = {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert")),
        "data": {"train": str(path), "validation": 0.3, "collect": {"count": 30, "like": [rows[0]["text"]]}},
        "stages": [{"finetune": {"epochs": 1}}],
        "evaluate": {"batch_sizes": [1], "resamples": 200, "speed_seconds": 0.1},
        "output": str(tmp_path / "run"),
    }
    report = run(recipe)
    facts = report["data"]
    assert facts["train"]["rows"] + facts["validation"]["rows"] == 30
    assert facts["train"]["collected"]["of"] + facts["validation"]["collected"]["of"] == 60
    page = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "What was collected" in page
    assert "Chosen by likeness to the examples; diversity." in page
    assert run(recipe) == report
