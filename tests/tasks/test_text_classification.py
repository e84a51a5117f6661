import math

import numpy as np
import pytest
import torch
from datasets import Dataset

from moss_rlhf.model.cutting import Cut
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.tasks import TASKS, TextClassification
from moss_rlhf.tasks.loading import encoded

TASK = TextClassification()
TEXTS = [
    "the film was good",
    "bad",
    "what a lovely hotel , we all said so in the end",
    "电影很好。",
    "awful soup , bad",
]


class Recorder:
    """A runtime whose answer to a row is what the row holds: its first word's id and its length."""

    name = "recorder"

    def __init__(self):
        self.shapes = []

    def run(self, batch):
        self.shapes.append(batch["input_ids"].shape)
        return np.stack([batch["input_ids"][:, 1], batch["attention_mask"].sum(axis=1)], axis=1).astype(np.float32)


def test_predictions_come_in_the_rows_order_from_batches_of_like_lengths(tiny_model):
    model, runtime = tiny_model(), Recorder()
    rows = encoded(model, [{"text": text} for text in TEXTS])
    answers = TASK.predict(runtime, rows, model.tokenizer, batch_size=2)
    assert answers.tolist() == [[row["input_ids"][1], len(row["input_ids"])] for row in rows]
    lengths = sorted(len(row["input_ids"]) for row in rows)
    assert runtime.shapes == [(2, lengths[1]), (2, lengths[3]), (1, lengths[4])]


def test_a_prediction_does_not_depend_on_its_batch(tiny_model):
    model = tiny_model()
    rows = encoded(model, [{"text": text} for text in TEXTS])
    runtime = TorchRuntime(model.network)
    together, alone = (TASK.predict(runtime, rows, model.tokenizer, batch_size=size) for size in (5, 1))
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


def test_encoding_cuts_the_tail_and_keeps_the_ends_mark(tiny_model):
    model = tiny_model()
    rows = TASK.encode(Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 1, 0]}), model.tokenizer, max_length=5)
    assert max(rows["length"]) == 5
    assert all(row["input_ids"][-1] == model.tokenizer.sep_token_id for row in rows)
    assert all(row["length"] == len(row["input_ids"]) for row in rows)
    assert rows["labels"][:] == [1, 0, 1, 1, 0]
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "labels", "length"}


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_head_and_tail_of_a_long_text_between_the_special_tokens(family, tiny_model):
    tokenizer = tiny_model(family).tokenizer
    text = "good bad great awful lovely boring film hotel phone soup room book"
    whole = tokenizer(text)["input_ids"]
    assert len(whole) == 14  # a word a token, and two special ones
    rows = Dataset.from_dict({"text": [text, "bad film"], "label": [1, 0]})

    def ids(keep):
        return TASK.encode(rows, tokenizer, max_length=10, keep=keep)["input_ids"][:]

    assert ids("head") == [[*whole[:9], whole[-1]], tokenizer("bad film")["input_ids"]]
    assert ids("tail") == [[whole[0], *whole[5:]], tokenizer("bad film")["input_ids"]]
    assert ids("head+tail") == [[whole[0], *whole[1:3], *whole[7:13], whole[-1]], tokenizer("bad film")["input_ids"]]


def test_cutting_keeps_every_column_in_step(tiny_model):
    tokenizer = tiny_model().tokenizer
    rows = TASK.encode(Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1, 1, 0]}), tokenizer, 5, keep="tail")
    assert set(rows.column_names) == {"input_ids", "token_type_ids", "labels", "length"}
    assert all(row["length"] == len(row["input_ids"]) == len(row["token_type_ids"]) <= 5 for row in rows)
    assert rows["labels"][:] == [1, 0, 1, 1, 0]


def test_windows_are_rows_of_their_text_and_their_logits_are_averaged(tiny_model):
    model = tiny_model()
    texts = ["bad film", " ".join(["good", "film"] * 9), "awful"]
    rows = TASK.encode(Dataset.from_dict({"text": texts, "label": [0, 1, 0]}), model.tokenizer, 10, keep="windows")
    assert rows["row"][:] == [0, 1, 1, 1, 2]  # 18 words in room 8: steps of 6, the last ends with the text
    assert rows["labels"][:] == [0, 1, 1, 1, 0]
    assert TASK.labels(rows).tolist() == [0, 1, 0]
    assert TASK.texts(rows) == 3
    runtime = TorchRuntime(model.network)
    pooled = TASK.predict(runtime, rows, model.tokenizer, batch_size=2)
    single = TASK.predict(runtime, rows.remove_columns("row"), model.tokenizer, batch_size=2)
    assert pooled.shape == (3, 2)
    np.testing.assert_allclose(pooled[1], single[1:4].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(pooled[[0, 2]], single[[0, 4]])
    assert TASK.measure(model.network, rows, model.tokenizer)["accuracy"] in (0, 1 / 3, 2 / 3, 1)


def test_rows_are_encoded_as_the_model_was_trained(tiny_model):
    model = tiny_model()
    model.cut = Cut("tail", 5)
    (row,) = encoded(model, [{"text": "good bad great awful lovely"}])
    expected = model.tokenizer("great awful lovely")["input_ids"]
    assert row["input_ids"] == expected


def test_lengths_are_uncut_and_the_sample_is_seeded(tiny_model):
    tokenizer = tiny_model().tokenizer
    texts = [" ".join(["good"] * number) for number in range(1, 101)]  # up to 102 tokens, the limit is 64
    rows = Dataset.from_dict({"text": texts})
    assert TASK.lengths(rows, tokenizer, most=1000, seed=0).tolist() == list(range(3, 103))
    sample = TASK.lengths(rows, tokenizer, most=10, seed=1)
    assert len(set(sample.tolist())) == 10
    assert sample.tolist() == TASK.lengths(rows, tokenizer, most=10, seed=1).tolist()
    assert sample.tolist() != TASK.lengths(rows, tokenizer, most=10, seed=2).tolist()


def test_loss_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    labels = torch.tensor([1, 1])
    # probabilities of the labels: 3/4 and 1/5
    assert float(TASK.loss(logits, labels, reduction="sum")) == pytest.approx(math.log(4 / 3) + math.log(5))
    assert float(TASK.loss(logits, labels)) == pytest.approx((math.log(4 / 3) + math.log(5)) / 2)
    assert TASK.loss(logits.bfloat16(), labels).dtype == torch.float32


def test_a_collated_batch_is_what_the_network_takes(tiny_model):
    model = tiny_model("distilbert")
    rows = encoded(model, [{"text": text, "label": "positive"} for text in TEXTS])
    batch = TASK.collate([rows[0], rows[1]], model.tokenizer)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [1, 1]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_answers_and_the_table_of_tasks():
    assert TASK.answers(np.array([[0.1, 0.2], [3.0, -1.0]], dtype=np.float32)).tolist() == [1, 0]
    assert all(name == task.name and task.metric in task.metrics for name, task in TASKS.items())
