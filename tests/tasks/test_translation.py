"""Pairs of texts → rows, and what an encoder-decoder makes of them; numbers against ones worked out by hand."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sacrebleu.metrics import CHRF

import moss_rlhf
from moss_rlhf.errors import DataError
from moss_rlhf.evaluation import translate
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward
from moss_rlhf.optimization.calibration import mean_loss
from moss_rlhf.tasks import Translation
from moss_rlhf.tasks.language import IGNORED
from moss_rlhf.tasks.loading import encoded

TASK = Translation()
PAIRS = [
    {"source": "the film was good and we would know", "target": "good film , and we know"},
    {"source": "bad soup", "target": "what a bad soup , we all said so in the end"},
    {"source": "lovely", "target": "a lovely story"},
]
FAMILIES = ["t5", "bart"]
LEARNING = {"epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "precision": "float32"}


def by_hand(model, rows):
    """(rows, 3) from the float64 log-softmax of one pair at a time; transformers shifts the labels itself."""
    scores = []
    for row in rows:
        source, target = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.inference_mode():
            chances = model.network.eval()(input_ids=source, labels=target).logits[0].double().log_softmax(dim=1)
        right = int((chances.argmax(dim=1) == target[0]).sum())
        scores.append([-float(chances[range(len(target[0])), target[0]].sum()), target.shape[1], right])
    return np.array(scores)


def test_both_texts_are_encoded_and_cut(tiny_model):
    tokenizer = tiny_model("t5").tokenizer
    pairs = Dataset.from_dict({"source": ["the film was good", "bad"], "target": ["good", "bad film and bad soup"]})
    rows = TASK.encode(pairs, tokenizer, max_length=4)
    ends = tokenizer.eos_token_id
    assert [ids[-1] for ids in [*rows["input_ids"], *rows["labels"]]] == [ends] * 4
    assert [len(ids) for ids in rows["input_ids"]] == [4, 2]
    assert [len(ids) for ids in rows["labels"]] == [2, 4]
    assert rows["length"][:] == [4, 4]
    assert TASK.lengths(pairs, tokenizer, most=10, seed=0).tolist() == [5, 6]  # uncut, of the longer one


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_is_given_the_labels_shifted_right(tiny_model, family):
    model = tiny_model(family)
    start, padding = model.network.config.decoder_start_token_id, model.tokenizer.pad_token_id
    batch = TASK.collate(
        [{"input_ids": [5, 6], "labels": [7, 8, 9]}, {"input_ids": [5], "labels": [7]}], model.tokenizer
    )
    assert batch["labels"].tolist() == [[7, 8, 9], [7, IGNORED, IGNORED]]
    inputs = TASK.inputs(model.network, batch)
    assert set(inputs) == {"input_ids", "attention_mask", "decoder_input_ids"}
    assert inputs["decoder_input_ids"].tolist() == [[start, 7, 8], [start, 7, padding]]
    assert TASK.targets(batch["labels"]) == 4


def test_loss_is_the_mean_over_target_tokens_by_hand():
    logits = torch.tensor([[[0, math.log(3)], [0, math.log(4)]], [[0, 0], [50, -50]]])
    labels = torch.tensor([[1, 0], [1, IGNORED]])
    total = math.log(4 / 3) + math.log(5) + math.log(2)
    assert float(TASK.loss(logits, labels, reduction="sum")) == pytest.approx(total)
    assert float(TASK.loss(logits, labels)) == pytest.approx(total / 3)
    assert TASK.at_targets(logits, labels).shape == (3, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_a_float64_softmax_by_hand_in_any_batch(tiny_model, rows_of, family, monkeypatch):
    model = tiny_model(family)
    rows = encoded(model, rows_of("translation")[:9])
    expected = by_hand(model, rows)
    np.testing.assert_allclose(TASK.scores(model.network, rows, model.tokenizer), expected, rtol=1e-6)
    monkeypatch.setattr("moss_rlhf.tasks.language._TOKENS_AT_ONCE", 1)
    np.testing.assert_allclose(TASK.scores(model.network, rows, model.tokenizer), expected, rtol=1e-6)
    loss = expected[:, 0].sum() / expected[:, 1].sum()
    assert mean_loss(model, rows) == pytest.approx(loss, rel=1e-6)
    found = moss_rlhf.evaluate(model, rows, resamples=100)["metrics"]
    assert found["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["token_accuracy"]["value"] == expected[:, 2].sum() / expected[:, 1].sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_fine_tuning_lowers_the_perplexity_the_same_way_twice(tiny_model, rows_of, family):
    rows = rows_of("translation")
    trained = [tiny_model(family) for _ in range(2)]
    before = TASK.measure(trained[0].network, encoded(trained[0], rows), trained[0].tokenizer)
    for model in trained:
        moss_rlhf.finetune(model, rows, rows[::3], **LEARNING)
    after = TASK.measure(trained[0].network, encoded(trained[0], rows), trained[0].tokenizer)
    assert after["perplexity"] < 0.5 * before["perplexity"]
    weights = [model.network.state_dict() for model in trained]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_distillation_alone_teaches_what_the_teacher_knows(tiny_model, rows_of):
    rows = rows_of("translation")
    teacher, student = tiny_model("t5"), tiny_model("t5", blocks=1)
    moss_rlhf.finetune(teacher, rows, rows[::3], **LEARNING)
    before = TASK.measure(student.network, encoded(student, rows), student.tokenizer)
    moss_rlhf.finetune(student, rows, rows[::3], teacher=teacher, distill={"weight": 1.0}, **LEARNING)
    after = TASK.measure(student.network, encoded(student, rows), student.tokenizer)
    assert after["perplexity"] < 0.7 * before["perplexity"]


def test_a_pair_without_a_target_is_refused(tiny_model):
    with pytest.raises(
        DataError, match="no column 'target'; translation needs source and target, and the columns are s"
    ):
        moss_rlhf.evaluate(tiny_model("t5"), [{"source": "good"}])


# What it writes by itself


@pytest.mark.parametrize("shorter", [False, True])
@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "marian"])
def test_a_translation_is_the_likeliest_token_again_and_again(family, shorter, tiny_model):
    """Against a loop that reads the whole of what was written for every token, one row at a time, without padding."""
    model = tiny_model(family)
    if shorter:  # the lowest block of each stack goes, and half of each feed-forward
        keep_blocks(model.network, [index for index, block in enumerate(model.anatomy.blocks) if block.index])
        for block in model.anatomy.blocks:
            keep_feed_forward(block, torch.arange(block.feed_forward.width // 2))
    rows = TASK.encode(Dataset.from_list(PAIRS), model.tokenizer, max_length=16)
    most = 9
    written = TASK.write(TorchRuntime(model.network), rows, model.tokenizer, most)
    end, start = model.tokenizer.eos_token_id, model.network.config.decoder_start_token_id
    never = [ids[0] for ids in model.network.generation_config.bad_words_ids or []]
    for row, text in zip(rows, written, strict=True):
        ids = [start]
        while len(ids) <= most and (len(ids) == 1 or ids[-1] != end):
            with torch.no_grad():
                asked = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": torch.tensor([ids])}
                logits = model.network.eval()(**asked).logits[0, -1]
            logits[never] = -torch.inf
            ids.append(int(logits.argmax()))
        assert text == model.tokenizer.decode(ids[1:], skip_special_tokens=True).strip()


def test_translations_are_measured_beside_perplexity_where_the_targets_texts_are_known(tiny_model):
    model = tiny_model("t5")
    found = moss_rlhf.evaluate(model, PAIRS, resamples=200)["metrics"]
    assert found.keys() == {"perplexity", "token_accuracy", "bleu", "chrf"}
    rows = encoded(model, PAIRS)
    written = translate(model, TorchRuntime(model.network), rows, [row["target"] for row in PAIRS])
    expected = CHRF().corpus_score(written.texts, [[row["target"] for row in PAIRS]]).score / 100
    assert found["chrf"]["value"] == pytest.approx(expected)
    assert found["chrf"]["low"] <= expected <= found["chrf"]["high"]
    assert moss_rlhf.evaluate(model, rows, resamples=200)["metrics"].keys() == {"perplexity", "token_accuracy"}
