"""Documents → rows of tokens, and what a decoder makes of them; every number against one worked out by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.optimization.calibration import labelled_batches, mean_loss
from moss_rlhf.tasks import TextGeneration
from moss_rlhf.tasks.language import IGNORED, perplexity, token_accuracy
from moss_rlhf.tasks.loading import encoded

TASK = TextGeneration()
DECODERS = ["gpt2", "llama"]
TEXTS = ["the film was good", "bad soup", "what a lovely hotel , we all said so in the end", "电影很好。", "good"]
LEARNING = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"}


def by_hand(model, rows):
    """(rows, 3) from the float64 log-softmax of one row at a time, without padding or mask."""
    scores = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.inference_mode():
            chances = model.network.eval()(input_ids=ids).logits[0].double().log_softmax(dim=1)
        targets = ids[0, 1:]
        right = int((chances[:-1].argmax(dim=1) == targets).sum())
        scores.append([-float(chances[range(len(targets)), targets].sum()), len(targets), right])
    return np.array(scores)


@pytest.mark.parametrize("length", [2, 3, 7, 64])
@pytest.mark.parametrize("family", DECODERS)
def test_every_token_but_the_first_is_foretold_once(tiny_model, family, length):
    """The rows of a document put end to end are its tokens: no token is lost, none foretold twice."""
    tokenizer = tiny_model(family).tokenizer
    rows = TASK.encode(Dataset.from_dict({"text": [TEXTS[2]]}), tokenizer, max_length=length)
    whole = tokenizer(TEXTS[2])["input_ids"]
    first, *others = rows["input_ids"][:]
    assert [*first, *(token for ids in others for token in ids[1:])] == whole
    assert all(before[-1] == after[0] for before, after in zip(rows["input_ids"][:], others, strict=False))
    assert max(rows["length"]) == min(length, len(whole))
    assert sum(count - 1 for count in rows["length"]) == len(whole) - 1
    assert rows["length"][:] == [len(ids) for ids in rows["input_ids"]]


def test_documents_never_share_a_row_and_one_of_a_single_token_has_none(tiny_model):
    tokenizer = tiny_model("gpt2").tokenizer
    rows = TASK.encode(Dataset.from_dict({"text": ["good", "", "bad soup", "good film"]}), tokenizer, max_length=64)
    assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["bad soup", "good film"]


def test_a_row_of_one_token_is_refused(tiny_model):
    with pytest.raises(ValueError, match="at least 2, a token and the next, got 1"):
        TASK.encode(Dataset.from_dict({"text": TEXTS}), tiny_model("gpt2").tokenizer, max_length=1)


def test_labels_are_the_inputs_and_padding_is_none(tiny_model):
    """GPT-2 pads with its end-of-text token: the mask tells them apart, not the id."""
    model = tiny_model("gpt2")
    end = model.tokenizer.eos_token_id
    assert model.tokenizer.pad_token_id == end
    batch = TASK.collate([{"input_ids": [5, end, 6]}, {"input_ids": [7, 8]}], model.tokenizer)
    assert batch["labels"].tolist() == [[5, end, 6], [7, 8, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["input_ids"][0].tolist() == [5, end, 6]
    assert TASK.targets(batch["labels"]) == 3


def test_loss_by_hand():
    """Row 1 foretells tokens 1 and 0, with probabilities 3/4 and 1/5; row 2 token 1, with 1/2; its padding nothing."""
    logits = torch.tensor([[[0, math.log(3)], [0, math.log(4)], [9, 9]], [[0, 0], [50, -50], [9, 9]]])
    labels = torch.tensor([[0, 1, 0], [0, 1, IGNORED]])
    total = math.log(4 / 3) + math.log(5) + math.log(2)
    assert float(TASK.loss(logits, labels, reduction="sum")) == pytest.approx(total)
    assert float(TASK.loss(logits, labels)) == pytest.approx(total / 3)  # over tokens, not over rows
    assert TASK.at_targets(logits, labels).tolist() == [logits[0, 0].tolist(), logits[0, 1].tolist(), [0, 0]]
    assert TASK.loss(logits.bfloat16(), labels).dtype == torch.float32


def test_metrics_by_hand():
    sums = np.array([[math.log(8), 3, 1], [2 * math.log(5), 2, 0]])
    assert perplexity(sums) == pytest.approx([2, 5])
    assert perplexity(sums.sum(axis=0)) == pytest.approx(200 ** (1 / 5))
    assert token_accuracy(sums) == pytest.approx([1 / 3, 0])
    assert np.isfinite(perplexity(np.array([1e9, 1, 0])))  # of broken weights


@pytest.mark.parametrize("family", DECODERS)
def test_scores_are_those_of_a_float64_softmax_by_hand(tiny_model, family):
    model = tiny_model(family)
    rows = encoded(model, [{"text": text} for text in TEXTS], max_length=6)
    scores = TASK.scores(model.network, rows, model.tokenizer)
    np.testing.assert_allclose(scores, by_hand(model, rows), rtol=1e-6)


@pytest.mark.parametrize("family", DECODERS)
def test_nothing_depends_on_the_batch(tiny_model, family, monkeypatch):
    """Alone or padded beside others: the same loss and scores."""
    model = tiny_model(family)
    rows = encoded(model, [{"text": text} for text in TEXTS])
    together, loss = TASK.scores(model.network, rows, model.tokenizer), mean_loss(model, rows)
    monkeypatch.setattr("moss_rlhf.tasks.language._TOKENS_AT_ONCE", 1)
    monkeypatch.setattr("moss_rlhf.model.memory._ROWS_AT_ONCE", 1)
    np.testing.assert_allclose(TASK.scores(model.network, rows, model.tokenizer), together, rtol=1e-6)
    assert mean_loss(model, rows) == pytest.approx(loss, rel=1e-6)
    sums = together.sum(axis=0)
    assert loss == pytest.approx(sums[0] / sums[1], rel=1e-6)


def test_calibration_gives_inputs_and_labels(tiny_model):
    model = tiny_model("llama")
    ((inputs, labels),) = labelled_batches(model, encoded(model, [{"text": text} for text in TEXTS]))
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert torch.equal(labels, torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], IGNORED))


@pytest.mark.parametrize("family", DECODERS)
def test_evaluate_measures_perplexity_with_its_interval(tiny_model, family):
    model = tiny_model(family)
    rows = encoded(model, [{"text": text} for text in TEXTS])
    found = moss_rlhf.evaluate(model, rows, resamples=200)
    sums = by_hand(model, rows).sum(axis=0)
    assert found["rows"] == len(rows)
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(sums[0] / sums[1]), rel=1e-6)
    assert found["metrics"]["token_accuracy"]["value"] == sums[2] / sums[1]
    assert found["metrics"]["perplexity"]["low"] < found["metrics"]["perplexity"]["value"]
    assert found["parameters"] == model.parameters


@pytest.mark.parametrize("family", DECODERS)
def test_fine_tuning_lowers_the_perplexity_and_keeps_the_lowest(tiny_model, rows_of, family):
    rows = rows_of("text-generation")
    trained = [tiny_model(family) for _ in range(2)]
    before = TASK.measure(trained[0].network, encoded(trained[0], rows), trained[0].tokenizer)
    trainings = [moss_rlhf.finetune(model, rows, rows[::3], **LEARNING) for model in trained]
    after = TASK.measure(trained[0].network, encoded(trained[0], rows), trained[0].tokenizer)
    assert after["perplexity"] < 0.2 * before["perplexity"]
    measured = [point["perplexity"] for point in trainings[0].history["validation"]]
    assert trainings[0].facts["best_validation_perplexity"] == min(measured)
    weights = [model.network.state_dict() for model in trained]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_early_stopping_waits_for_a_lower_perplexity(tiny_model, rows_of):
    """Validation is a text of other words: the better the rest is learned, the worse it is foretold."""
    other = [{"text": "电影很好 , 房间不好 ."}]
    training = moss_rlhf.finetune(
        tiny_model("gpt2"),
        rows_of("text-generation"),
        other,
        early_stopping={"patience": 1},
        **(LEARNING | {"epochs": 8}),
    )
    measured = [point["perplexity"] for point in training.history["validation"]]
    assert training.facts["stopped_early"]
    assert training.facts["best_validation_perplexity"] == min(measured) < measured[-1]


@pytest.mark.parametrize("family", DECODERS)
def test_distillation_alone_teaches_what_the_teacher_knows(tiny_model, rows_of, family):
    """The labels' loss has no weight: what the student learns it has from its teacher's probabilities."""
    rows = rows_of("text-generation")
    teacher, student = tiny_model(family), tiny_model(family, blocks=1)
    moss_rlhf.finetune(teacher, rows, rows[::3], **LEARNING)
    taught = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    before = TASK.measure(student.network, encoded(student, rows), student.tokenizer)
    moss_rlhf.finetune(student, rows, rows[::3], teacher=teacher, distill={"weight": 1.0}, **LEARNING)
    after = TASK.measure(student.network, encoded(student, rows), student.tokenizer)
    assert after["perplexity"] < 0.3 * before["perplexity"]
    assert all(torch.equal(value, taught[name]) for name, value in teacher.network.state_dict().items())


def test_a_teacher_of_another_task_is_refused(tiny_model, rows_of):
    rows = rows_of("text-generation")
    with pytest.raises(ModelError, match="teacher's task is text-classification, the model's text-generation"):
        moss_rlhf.finetune(tiny_model("gpt2"), rows, rows, teacher=tiny_model("bert"))


def test_rows_that_hold_nothing_to_foretell_are_an_error(tiny_model, rows_of):
    empty = [{"text": ""}, {"text": "good"}]
    with pytest.raises(DataError, match="train holds no rows"):
        moss_rlhf.finetune(tiny_model("gpt2"), empty, rows_of("text-generation"))
    with pytest.raises(DataError, match="no rows to measure on"):
        moss_rlhf.evaluate(tiny_model("gpt2"), empty)


def test_weights_that_are_not_finite_are_an_error(tiny_model):
    model = tiny_model("gpt2")
    next(model.network.parameters()).data[:] = math.nan
    with pytest.raises(ModelError, match="probabilities are not finite"):
        moss_rlhf.evaluate(model, [{"text": TEXTS[0]}])


def test_loading_needs_no_labels_and_saving_changes_nothing(tiny_checkpoint, tmp_path):
    model = moss_rlhf.load(tiny_checkpoint("gpt2"), task="text-generation")
    rows = encoded(model, [{"text": text} for text in TEXTS])
    moss_rlhf.save(model, tmp_path / "model")
    again = moss_rlhf.load(tmp_path / "model")
    assert again.task == "text-generation"
    assert np.array_equal(
        TASK.scores(model.network, rows, model.tokenizer), TASK.scores(again.network, rows, again.tokenizer)
    )
