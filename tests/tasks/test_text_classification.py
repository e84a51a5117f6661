import math

import numpy as np
import pytest
import torch
from datasets import Dataset

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
