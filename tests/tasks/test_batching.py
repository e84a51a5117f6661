import numpy as np
import pytest

from moss_rlhf.tasks.batching import batches_of, by_length, chunks, pad, padding_of


def test_rows_are_padded_on_the_right_to_the_longest():
    rows = [
        {"input_ids": [5, 6, 7], "token_type_ids": [0, 0, 1]},
        {"input_ids": [8], "token_type_ids": [1], "labels": 3},
    ]
    batch = pad(rows, {"input_ids": 9, "token_type_ids": 4, "attention_mask": 0})
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 1], [1, 4, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int64)}
    assert set(pad(rows, {"input_ids": 0})) == {"input_ids"}  # no mask where the network takes none


def test_every_input_has_its_own_length():
    batch = pad(
        [{"input_ids": [5], "labels": [7, 8]}, {"input_ids": [6, 6, 6], "labels": []}], {"input_ids": 0, "labels": -1}
    )
    assert batch["input_ids"].tolist() == [[5, 0, 0], [6, 6, 6]]
    assert batch["labels"].tolist() == [[7, 8], [-1, -1]]


@pytest.mark.parametrize(("family", "padding"), [("bert", 0), ("roberta", 1), ("xlm-roberta", 1), ("distilbert", 0)])
def test_padding_is_the_tokenizers_own(tiny_model, family, padding):
    tokenizer = tiny_model(family).tokenizer
    assert padding_of(tokenizer)["input_ids"] == padding
    rows = [dict(tokenizer(text)) for text in ("the film was good", "bad")]
    own = tokenizer(["the film was good", "bad"], padding=True, return_tensors="np")
    batch = pad(rows, padding_of(tokenizer))
    assert set(batch) == set(own)
    assert all(np.array_equal(batch[name], own[name]) for name in own)


def test_batches_keep_order_and_the_rest():
    rows = [{"input_ids": [number] * (number + 1)} for number in range(5)]
    batches = batches_of(rows, 2, {"input_ids": 0})
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert batches_of([], 2, {"input_ids": 0}) == []
    assert list(chunks([4, 2, 9], 2)) == [[4, 2], [9]]


def test_by_length_is_stable():
    assert by_length([3, 1, 2, 1, 3]).tolist() == [1, 3, 2, 0, 4]
