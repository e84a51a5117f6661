"""`clean` on rows in memory: the same checks as a recipe's, the rows in the form in which they came."""

import inspect

import pytest
from datasets import Dataset

from moss_rlhf import clean
from moss_rlhf.errors import DataError, RecipeError
from moss_rlhf.recipe import CleanSpec

ROWS = [
    {"text": "one two three", "label": "a", "id": 1},
    {"text": "one two three", "label": "a", "id": 2},
    {"text": "four five six", "label": "b", "id": 3},
    {"text": "four five six", "label": "a", "id": 4},
    {"text": "fine<br />film", "label": "b", "id": 5},
    {"text": "seven eight", "label": 1, "id": 6},
    {"text": "???", "label": 1, "id": 7},
]


def _found(findings):
    return [(found.split, found.check, found.line, found.action, found.partner) for found in findings]


def test_rows_come_back_without_those_that_are_dropped():
    kept, findings = clean(ROWS, empty="drop", duplicates="drop", conflicts="flag", markup="mend")
    assert [row["id"] for row in kept] == [1, 3, 4, 5, 6]
    assert kept[3] == {"text": "fine film", "label": "b", "id": 5}
    assert ROWS[4]["text"] == "fine<br />film"  # what was given is as it was
    assert _found(findings) == [
        ("train", "empty", 7, "drop", ""),
        ("train", "markup", 5, "mend", ""),
        ("train", "duplicates", 2, "drop", "train row 1"),
        ("train", "conflicts", 3, "flag", "train row 4"),
        ("train", "conflicts", 4, "flag", "train row 3"),
    ]
    assert findings[0].label == "1"


def test_a_data_set_is_one_afterwards():
    rows = [row | {"label": str(row["label"])} for row in ROWS]
    kept, findings = clean(Dataset.from_list(rows), duplicates="drop", markup="mend")
    listed, same = clean(rows, duplicates="drop", markup="mend")
    assert kept.to_list() == listed
    assert kept.column_names == ["text", "label", "id"]
    assert findings == same


def test_several_splits_lose_leaks_and_test_loses_nothing():
    long = "the hotel stands by the harbour and its rooms look out over the boats, which leave at six"
    given = {
        "train": [{"text": long, "label": "a"}, *ROWS[4:6]],
        "validation": [{"text": "of its own", "label": "a"}],
        "test": [{"text": long.replace("six", "ten"), "label": "a"}, {"text": "!!", "label": "b"}],
    }
    with pytest.raises(DataError, match=r"^clean: would leave no row of the class 'a' in train"):
        clean(given, leaks="drop")
    given["train"].append(ROWS[0])
    kept, findings = clean(given, leaks="drop", empty="drop")
    assert [len(kept[split]) for split in given] == [3, 1, 2]
    assert _found(findings) == [("train", "leaks", 1, "drop", "test row 1"), ("test", "empty", 2, "flag", "")]


def test_label_errors_take_a_model(tiny_model, rows):
    turned = [row | {"label": "positive" if place == 1 else row["label"]} for place, row in enumerate(rows)]
    with pytest.raises(RecipeError, match=r"^clean: model: is needed to compare texts for label_errors"):
        clean(turned, label_errors="drop")
    kept, findings = clean(turned, label_errors="drop", model=tiny_model())
    assert len(kept) == len(turned) - len(findings)
    assert all(found.check == "label_errors" and "other rows say" in found.reason for found in findings)


def test_other_tasks_have_other_columns():
    pairs = [{"source": "guten Tag", "target": "good day"}, {"source": "guten Tag", "target": "hello"}]
    assert clean([*pairs, pairs[0]], task="translation", duplicates="drop")[0] == pairs
    with pytest.raises(RecipeError, match=r"^clean\.conflicts: compares labels, and these rows have none"):
        clean(pairs, task="translation", conflicts="drop")
    with pytest.raises(RecipeError, match="there is no task 'translate'; did you mean 'translation'"):
        clean(pairs, task="translate")


@pytest.mark.parametrize(
    ("rows", "options", "error", "message"),
    [
        (ROWS, {"empty": "mend"}, RecipeError, r"clean\.empty: 'mend' can't be used; it must be 'off', 'flag' or"),
        (ROWS, {"near_duplicates": "drop", "threshold": 2}, RecipeError, r"clean\.threshold: 2 can't be used"),
        (ROWS, {"folds": 1}, RecipeError, r"clean\.folds: 1 can't be used"),
        ({"train": ROWS, "dev": ROWS}, {}, RecipeError, "no split 'dev'"),
        ({"test": ROWS}, {}, RecipeError, "train is missing"),
        ([], {}, DataError, "train holds no row"),
        ([{"review": "good"}], {}, DataError, r"train row 1 has no column 'text'; its columns are review\. Rename"),
        ([{"text": None}], {}, DataError, "train row 1: text is None; it must be a text"),
        ([ROWS[0], {"text": "x", "label": None}], {}, DataError, "train row 2: its label is no name"),
        ({"train": ROWS, "test": [{"text": "x"}]}, {}, DataError, "of train and test one has labels"),
    ],
)
def test_what_can_not_be_cleaned(rows, options, error, message):
    with pytest.raises(error, match=message):
        clean(rows, **options)


def test_python_has_the_options_and_defaults_of_a_recipe():
    given = inspect.signature(clean).parameters
    fields = {name: field.default for name, field in CleanSpec.model_fields.items() if name != "ablate"}
    assert {name: given[name].default for name in fields} == fields
