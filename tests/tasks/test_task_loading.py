import pytest
from datasets import Dataset

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.tasks.loading import encoded, load

ROWS = [{"text": "the film was good", "label": "positive"}, {"text": "bad", "label": "negative"}]


@pytest.mark.parametrize("labels", [["positive", "negative"], [1, 0]])
@pytest.mark.parametrize("kind", [list, tuple, Dataset.from_list])
def test_labels_may_be_names_or_ids_in_a_list_or_a_dataset(tiny_model, labels, kind):
    rows = kind([{"text": row["text"], "label": label} for row, label in zip(ROWS, labels, strict=True)])
    assert encoded(tiny_model(), rows)["labels"][:] == [1, 0]


def test_what_is_encoded_already_stays(tiny_model):
    model = tiny_model()
    once = encoded(model, ROWS)
    assert encoded(model, once) is once


def test_texts_alone_are_enough_and_the_length_is_bounded(tiny_model):
    rows = encoded(tiny_model(), [{"text": "good " * 200}, {"text": "bad"}])
    assert rows["length"][:] == [64, 3]
    assert "labels" not in rows.column_names
    assert encoded(tiny_model(), [{"text": "good " * 200}], max_length=8)["length"][:] == [8]


@pytest.mark.parametrize("label", ["neutral", "Positive", 2, -1, None, 0.5])
def test_a_label_that_the_model_does_not_know(tiny_model, label):
    with pytest.raises(DataError, match=r"not one of negative, positive"):
        encoded(tiny_model(), [{"text": "good", "label": label}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a text"], "a list of str can't be read. Give a list of mappings"),
        ("file.csv", "a str can't be read"),
        ({"text": ["a"], "label": [0]}, "a dict can't be read"),
        (None, "a NoneType can't be read"),
        ([{"text": None, "label": 0}], "row 1: text is None; it must be a text"),
        ([{"text": "a", "label": "negative"}, {"text": 3, "label": 1}], "row 2: text is 3"),
        ([{"text": "a", "label": True}], "the label True is not one of"),
    ],
)
def test_rows_of_another_kind_are_named(rows, message, tiny_model):
    with pytest.raises(DataError, match=message):
        encoded(tiny_model("bert"), rows)


def test_names_and_class_ids_may_stand_side_by_side(tiny_model):
    rows = [{"text": "a", "label": label} for label in ("positive", 0, 1.0)]
    assert encoded(tiny_model("bert"), rows)["labels"] == [1, 0, 1]


@pytest.mark.parametrize("labels", [["a", "a"], ["a"], "ab", ["a", ""], [], ["a", None]])
def test_labels_are_different_names(labels, tiny_checkpoint):
    with pytest.raises(DataError, match="give two names or more, all different"):
        load(tiny_checkpoint("bert", None), labels=labels)


def test_a_path_is_no_model(tiny_model, rows):
    network = tiny_model("bert").network
    for given in ("runs/model", network):
        with pytest.raises(ModelError, match=r"prune: takes a Model, got .*moss_rlhf\.load\(path\)"):
            moss_rlhf.prune(given, rows, sparsity=0.5)
