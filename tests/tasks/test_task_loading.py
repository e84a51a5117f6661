import pytest
from datasets import Dataset

from moss_rlhf.errors import DataError
from moss_rlhf.tasks.loading import encoded

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
