"""What the checks do to the splits: whose rows go, whose are listed only, and what is told of them."""

import csv
import importlib.util

import numpy as np
import pytest

from moss_rlhf.data import Column, load_splits
from moss_rlhf.data.balance import balance_train
from moss_rlhf.data.cleaning import check_packages, clean_splits, write_findings
from moss_rlhf.errors import DataError, MachineError, RecipeError
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CleanSpec, DataSpec

COLUMNS = (Column("text", "text"), Column("label", "label"))
QUIET = Progress(quiet=True)
HARBOUR = "The hotel stands by the harbour and its rooms look out over the boats, which leave every morning."
COPPER = "A dry report on the price of copper in the second quarter, with four tables and no conclusion."
TRAIN = [
    (HARBOUR, "a"),  # line 2: like a test text
    ("one two three four", "a"),
    ("one two three four", "a"),  # a duplicate of line 3
    ("five six seven", "a"),
    ("five six seven", "b"),  # a conflict, a tie
    ("fine<br />film", "b"),
    ("???", "b"),
    (COPPER, "b"),
    ("eight nine ten", "b"),
]
VALIDATION = [("some text of its own", "a"), ("!!!", "b"), ("a <b>bold</b> one", "b")]
TEST = [(HARBOUR.replace("morning", "evening"), "a"), ("...", "b"), ("and another text", "b"), ("...", "b")]


@pytest.fixture
def splits(tmp_path):
    def write(name, rows):
        path = tmp_path / name
        path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
        return str(path)

    def build(train=TRAIN):
        files = {"train": write("train.tsv", train), "validation": write("validation.tsv", VALIDATION)}
        spec = DataSpec(**files, test=write("test.tsv", TEST))
        return load_splits(spec, COLUMNS, seed=0, cache=tmp_path / "cache", progress=QUIET)

    return build


def _clean(splits, **checks):
    def no_vectors(texts):
        raise AssertionError("no check asked for vectors")

    return clean_splits(splits, COLUMNS, CleanSpec(**checks), seed=0, embed=no_vectors, progress=QUIET)


def _found(cleaned, split):
    return [
        (found.check, found.line, found.action, found.partner) for found in cleaned.findings if found.split == split
    ]


DROP_ALL = {
    "empty": "drop",
    "markup": "mend",
    "duplicates": "drop",
    "conflicts": "drop",
    "near_duplicates": "drop",
    "leaks": "drop",
}


def test_what_is_planted_is_found_where_it_stands(splits):
    cleaned = _clean(splits(), **DROP_ALL)
    assert _found(cleaned, "train") == [
        ("empty", 8, "drop", ""),
        ("markup", 7, "mend", ""),
        ("duplicates", 4, "drop", "train line 3"),
        ("conflicts", 5, "drop", "train line 6"),
        ("conflicts", 6, "drop", "train line 5"),
        ("leaks", 2, "drop", "test line 2"),
    ]
    texts = cleaned.splits.train["text"][:]
    assert texts == ["one two three four", "fine film", COPPER, "eight nine ten"]
    assert cleaned.splits.train["label"][:] == [0, 1, 1, 1]
    assert cleaned.splits.origins["train"].lines.tolist() == [3, 7, 9, 10]
    assert cleaned.kept["train"].tolist() == [1, 5, 7, 8]


def test_validation_loses_what_is_no_text_and_test_loses_nothing(splits):
    cleaned = _clean(splits(), **DROP_ALL)
    assert _found(cleaned, "validation") == [("empty", 3, "drop", ""), ("markup", 4, "flag", "")]
    assert cleaned.splits.validation["text"][:] == ["some text of its own", "a <b>bold</b> one"]
    assert {action for _, _, action, _ in _found(cleaned, "test")} == {"flag"}
    assert cleaned.splits.test["text"][:] == [text for text, _ in TEST]


def test_flags_change_no_row_and_no_digest_but_are_told(splits):
    before = splits()
    cleaned = _clean(before, **dict.fromkeys(DROP_ALL, "flag"))
    for name in ("train", "validation", "test"):
        assert getattr(cleaned.splits, name)["text"][:] == getattr(before, name)["text"][:]
    facts = cleaned.splits.facts["train"]
    assert facts["dropped"] == before.facts["train"]["dropped"]
    assert facts["findings"]["duplicates"] == {
        "count": 1,
        "actions": {"flag": 1},
        "examples": [
            {
                "line": 4,
                "label": "a",
                "action": "flag",
                "reason": "the same text and label",
                "partner": "train line 3",
                "text": "one two three four",
            }
        ],
    }
    assert "train: data.clean flagged 1 (empty), " in cleaned.splits.notes[-3]


def test_facts_count_what_is_left(splits):
    facts = _clean(splits(), **DROP_ALL).splits.facts["train"]
    assert facts["rows"] == 4
    assert facts["classes"] == {"a": 1, "b": 3}
    assert facts["duplicates"] == 0
    assert facts["dropped"] == {"empty": 1, "duplicates": 1, "conflicts": 2, "leaks": 1}


def test_the_digest_names_the_rows_that_are_left(splits):
    before = splits()
    digests = [
        _clean(before, **checks).splits.digest
        for checks in ({"empty": "drop"}, {"duplicates": "drop"}, {"markup": "mend"}, {"empty": "drop"})
    ]
    assert len({before.digest, *digests}) == 4
    assert digests[0] == digests[3]


def test_findings_are_written_as_csv(splits, tmp_path):
    cleaned = _clean(splits(), **DROP_ALL)
    place = tmp_path / "findings.csv"
    write_findings(cleaned.findings, place)
    with place.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cleaned.findings)
    assert rows[0] == {
        "split": "train",
        "check": "empty",
        "action": "drop",
        "line": "8",
        "label": "b",
        "reason": "0 letters and digits, at least 1 must be",
        "partner": "",
        "text": "???",
    }


def test_a_class_that_would_go_stops_the_work(splits):
    rows = splits([("???", "a"), ("!!?", "a"), *TRAIN[7:]])
    with pytest.raises(DataError, match=r"no row of the class 'a' in train \(dropped: 2 rows by empty\)"):
        _clean(rows, empty="drop")
    assert len(_clean(rows, empty="flag").splits.train) == 4


def test_checks_of_labels_are_refused_where_there_are_none(splits):
    import dataclasses

    bare = splits()
    bare = dataclasses.replace(
        bare, **{name: getattr(bare, name).remove_columns("label") for name in ("train", "validation", "test")}
    )
    with pytest.raises(RecipeError, match=r"data\.clean\.conflicts: compares labels"):
        _clean(bare, conflicts="flag")
    with pytest.raises(RecipeError, match=r"data\.balance: oversample needs classes"):
        balance_train(bare, COLUMNS, "oversample", 0)
    assert _found(_clean(bare, duplicates="drop"), "train") == [
        ("duplicates", 4, "drop", "train line 3"),
        ("duplicates", 6, "drop", "train line 5"),
    ]


def test_a_missing_package_is_named_before_work(monkeypatch):
    monkeypatch.setattr("moss_rlhf.data.cleaning.clean.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"data\.clean\.language: needs the package py3langid.*moss-rlhf\[clean\]"):
        check_packages(CleanSpec(language="flag"))
    with pytest.raises(MachineError, match=r"data\.clean\.ablate: needs the package sklearn"):
        check_packages(CleanSpec(ablate=True))
    with pytest.raises(MachineError, match=r"data\.clean\.label_method: needs the package"):
        check_packages(CleanSpec(label_errors="drop", label_method="confident"))
    check_packages(CleanSpec(duplicates="drop", label_errors="drop", label_method="neighbours"))
    check_packages(None)


def test_folds_that_a_rare_class_can_not_fill_are_refused_before_texts_are_embedded(splits, monkeypatch):
    monkeypatch.setattr("moss_rlhf.data.cleaning.clean.find_spec", lambda name: name)
    few = {"label_errors": "flag", "label_method": "confident"}
    with pytest.raises(DataError, match=r"^data\.clean\.folds: 5, but train has only 4 of the class 'a'.*folds: 4, or"):
        _clean(splits(), **few)
    with pytest.raises(DataError, match=r"^data\.clean\.folds: 4, but train has only 2 of the class 'a'"):
        _clean(splits(), **few, folds=4, duplicates="drop", conflicts="drop")  # counted after what they drop


CONFIDENT = pytest.param(
    "confident",
    marks=pytest.mark.skipif(importlib.util.find_spec("cleanlab") is None, reason="cleanlab is not installed"),
)


@pytest.mark.parametrize("method", ["neighbours", CONFIDENT])
def test_planted_label_errors_are_dropped_from_train(method, tmp_path):
    """Two clouds of points, 4 of 80 labels turned: those four are found, and the reason names the other label."""
    generator = np.random.default_rng(0)
    points = np.concatenate([generator.normal(size=(40, 6)) + 3, generator.normal(size=(40, 6)) - 3])
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    rows = [(f"text {number}", "b" if (number >= 40) != (number in (3, 17, 50, 71)) else "a") for number in range(80)]
    path = tmp_path / "train.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), "utf-8")
    splits = load_splits(
        DataSpec(train=str(path), validation=0.01), COLUMNS, seed=0, cache=tmp_path / "cache", progress=QUIET
    )

    def embed(texts):
        return np.stack([points[int(text.split()[1])] for text in texts]).astype(np.float32)

    spec = CleanSpec(label_errors="drop", label_method=method)
    cleaned = clean_splits(splits, COLUMNS, spec, seed=0, embed=embed, progress=QUIET)
    held = {int(text.split()[1]) for text in splits.validation["text"]}
    planted = {3, 17, 50, 71} - held
    assert {int(found.text.split()[1]) for found in cleaned.findings} == planted
    assert all("other rows say" in found.reason for found in cleaned.findings)
    assert len(cleaned.splits.train) == len(splits.train) - len(planted)
    assert len(cleaned.splits.validation) == len(splits.validation)


def test_balancing_touches_train_alone(splits):
    before = splits()
    after = balance_train(before, COLUMNS, "undersample", seed=0)
    assert after.facts["train"]["classes"] == {"a": 4, "b": 4}
    assert after.facts["train"]["dropped"]["undersampled"] == 1
    assert after.validation is before.validation
    assert after.test is before.test
    assert after.digest != before.digest
    over = balance_train(before, COLUMNS, "oversample", seed=0)
    assert over.facts["train"]["classes"] == {"a": 5, "b": 5}
    assert over.facts["train"]["balanced"] == {"how": "oversample", "before": {"a": 4, "b": 5}}
