"""Answers to raw texts, against the tokenizer and network of transformers used by hand."""

import itertools
import json
import shutil

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from moss_rlhf.errors import ModelError
from moss_rlhf.serving import Committee, Predictor

LABELS = ("negative", "positive", "unsure")
TEXTS = [
    "the film was good",
    "a",
    "",
    "这家店的面很好吃",
    "what a lovely story , and we would know " * 30,
    "??? \U0001f600",
]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_answers_are_those_of_transformers_one_text_at_a_time(family, tiny_checkpoint):
    """Padding (RoBERTa's is 1), truncation at the model's limit and the batch's other texts change nothing."""
    place = tiny_checkpoint(family, LABELS)
    network = AutoModelForSequenceClassification.from_pretrained(place).eval()
    tokenizer = AutoTokenizer.from_pretrained(place)
    answers = list(Predictor.open(place).predict(TEXTS, batch_size=4))
    assert len(answers) == len(TEXTS)
    for text, answer in zip(TEXTS, answers, strict=True):
        with torch.inference_mode():
            inputs = tokenizer(text, truncation=True, return_tensors="pt")
            probabilities = network(**inputs).logits.double().softmax(dim=1)[0]
        assert inputs["input_ids"].shape[1] <= 64
        assert answer.label == LABELS[int(probabilities.argmax())]
        assert answer.probability == pytest.approx(float(probabilities.max()), abs=1e-5)


@pytest.mark.parametrize("keep", ["head", "tail", "head+tail", "windows"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_texts_are_cut_as_in_training(keep, family, tiny_model, tmp_path):
    """The predictor, which has no transformers tokenizer, answers as the task that measures does."""
    from moss_rlhf.model.checkpoint import save_checkpoint
    from moss_rlhf.model.cutting import Cut
    from moss_rlhf.model.runtime import TorchRuntime
    from moss_rlhf.tasks import TASKS
    from moss_rlhf.tasks.loading import encoded, load

    model = tiny_model(family, LABELS)
    model.cut = Cut(keep, 9)
    save_checkpoint(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.cut == model.cut
    texts = [text for text in TEXTS if text]
    task = TASKS["text-classification"]
    logits = task.predict(
        TorchRuntime(again.network), encoded(again, [{"text": text} for text in texts]), again.tokenizer
    )
    expected = torch.from_numpy(logits).double().softmax(dim=1)
    answers = list(Predictor.open(tmp_path / "model").predict(texts))
    assert [answer.probability for answer in answers] == pytest.approx(expected.max(dim=1).values.tolist(), abs=1e-5)
    assert [answer.label for answer in answers] == [LABELS[place] for place in expected.argmax(dim=1)]


def test_no_more_is_read_than_a_batch_holds(tiny_checkpoint):
    """An endless stream of texts is answered as it comes."""
    read = []
    stream = (read.append(number) or f"text {number}" for number in itertools.count())
    answers = Predictor.open(tiny_checkpoint("bert", LABELS)).predict(stream, batch_size=5)
    assert read == []
    next(answers)
    assert len(read) == 5
    list(itertools.islice(answers, 5))
    assert len(read) == 10


def test_a_run_serves_what_its_report_measured(tiny_checkpoint, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_checkpoint("bert", LABELS), run / "model")
    (run / "recipe.yaml").write_text("task: text-classification\n")
    with pytest.raises(ModelError, match=r"run: this run is not finished\. Go on with moss run .*recipe\.yaml\."):
        Predictor.open(run)
    (run / "report.json").write_text(json.dumps({"after": {"artifact": "model"}}))
    assert Predictor.open(run).labels == LABELS
    shutil.rmtree(run / "model")
    with pytest.raises(ModelError, match="model: is no run, checkpoint or ONNX directory"):
        Predictor.open(run)


@pytest.mark.parametrize(
    ("spoil", "message"), [("unlink", "holds no tokenizer"), ("write", "tokenizer.json: is broken")]
)
def test_a_tokenizer_that_is_missing_or_broken(spoil, message, tiny_checkpoint, tmp_path):
    place = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("bert", LABELS), place)
    (place / "tokenizer.json").unlink() if spoil == "unlink" else (place / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=message):
        Predictor.open(place)


def test_a_model_that_knows_no_labels_is_refused(tiny_model, tmp_path):
    from moss_rlhf import save

    save(tiny_model("gpt2"), tmp_path / "model")
    with pytest.raises(ModelError, match="is a model for text-generation, and labels can be asked of a classifier"):
        Predictor.open(tmp_path / "model")


def test_a_committee_answers_with_the_mean_probability(tiny_checkpoint):
    """Of two models, one of which has its labels in another order."""
    places = [tiny_checkpoint("bert", LABELS), tiny_checkpoint("distilbert", LABELS[::-1])]
    first, second = (Predictor.open(place).probabilities(TEXTS) for place in places)
    mean = (first + second[:, ::-1]) / 2
    committee = Committee.open(places)
    answers = list(committee.predict(TEXTS, batch_size=len(TEXTS)))
    assert committee.labels == LABELS
    assert [answer.label for answer in answers] == [LABELS[index] for index in mean.argmax(axis=1)]
    assert [answer.probability for answer in answers] == pytest.approx(list(mean.max(axis=1)))
    in_pieces = list(Committee.open(places).predict(iter(TEXTS), batch_size=2))
    assert [answer.probability for answer in in_pieces] == pytest.approx(list(mean.max(axis=1)), abs=1e-5)


def test_a_committee_of_other_labels_is_refused(tiny_checkpoint):
    places = [tiny_checkpoint("bert", LABELS), tiny_checkpoint("bert", ("no", "yes"))]
    with pytest.raises(ModelError, match=r"its labels are no, yes; those of .* are negative, positive, unsure\. Give"):
        Committee.open(places)
