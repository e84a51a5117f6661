"""Before against after, from answers that are known: every number worked by hand."""

from pathlib import Path

import numpy as np
import pytest

from moss_rlhf import measuring
from moss_rlhf.artifacts import Artifact, torch_artifact
from moss_rlhf.evaluation import ClassAnswers, changed
from moss_rlhf.measuring import Measuring
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import EvaluateSpec
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

#             the truth: negative, positive, negative, positive
BEFORE = [[2, 0], [0, 2], [2, 0], [0, 2]]  # all right
AFTER = [[2, 0], [1, 0], [0, 9], [0, 2]]  # the second and third wrong, the third by far
SPEEDS = {
    "before": {"latency_ms": {"1": {"p50": 6.0, "p95": 9.0}}, "throughput": {"1": 100.0}},
    "after": {"latency_ms": {"1": {"p50": 2.0, "p95": 3.0}}, "throughput": {"1": 400.0}},
}


class Known:
    """Answers the rows in the order in which a task asks for them: by length, which are 1 word, 2, 3 and 4."""

    name = "known"

    def __init__(self, logits):
        self.logits = np.array(logits, dtype=np.float32)

    def run(self, batch):
        assert len(batch["input_ids"]) == len(self.logits)
        return self.logits


@pytest.fixture
def compared(tiny_model, tmp_path, monkeypatch):
    def compare(before=True):
        monkeypatch.setattr(measuring, "measure_speed", lambda artifacts, *_, **__: {n: SPEEDS[n] for n in artifacts})
        monkeypatch.setattr(measuring, "peak_memory", lambda *_, **__: 123)
        model, texts = tiny_model(), ["good", "good film", "good film good", "good film good film"]
        rows = [{"text": t, "label": label} for t, label in zip(texts, ["negative", "positive"] * 2, strict=True)]
        for name, size in (("before", 1000), ("after", 250)):
            (tmp_path / name).write_bytes(b"0" * size)
        first = Artifact(tmp_path / "before", model, Known(BEFORE)) if before else None
        second = Artifact(tmp_path / "after", model, Known(AFTER))
        spec = EvaluateSpec(batch_sizes=[1], resamples=200)
        measure = Measuring(encoded(model, rows), "test", tmp_path, spec, 0, Progress(quiet=True))
        return measure.compare(first, second, None, rows)

    return compare


def test_gain_by_hand(compared):
    gain = compared()["gain"]
    assert gain["size"] == 4.0
    assert gain["speedup"] == {"1": 4.0}
    assert gain["latency"] == {"1": 3.0}
    assert gain["metric"]["name"] == "accuracy"
    assert gain["metric"]["delta"] == -0.5
    assert gain["metric"]["p_value"] == 0.5  # McNemar: 2 of 2 discordant rows to one side, two-sided 2 · ¼


def test_measurements_by_hand(compared):
    report = compared()
    assert report["before"]["metrics"]["accuracy"]["value"] == 1.0
    assert report["after"]["metrics"]["accuracy"]["value"] == 0.5
    assert report["before"]["artifact"] == "before"
    assert [report[name]["bytes"] for name in ("before", "after")] == [1000, 250]
    assert report["after"]["rows"] == 4
    assert report["after"]["peak_memory_bytes"] == 123
    assert report["reference"] is None


def test_confusion_and_changed_answers_bear_the_labels_names(compared):
    report = compared()
    assert report["confusion"] == {
        "labels": ["negative", "positive"],
        "before": [[2, 0], [0, 2]],
        "after": [[1, 1], [1, 1]],
    }
    assert report["changed_total"] == 2
    assert report["changed"] == [
        {"text": "good film good", "label": "negative", "before": "negative", "after": "positive"},
        {"text": "good film", "label": "positive", "before": "positive", "after": "negative"},
    ]


def test_without_a_before_there_is_no_gain(compared):
    report = compared(before=False)
    assert (report["before"], report["gain"], report["confusion"]["before"]) == (None, None, None)
    assert (report["changed"], report["changed_total"]) == ([], 0)
    assert report["after"]["metrics"]["accuracy"]["value"] == 0.5


def test_changed_rows_come_with_the_largest_move_first_and_no_more_than_asked():
    truth = np.zeros(3, dtype=np.int64)
    before = np.array([[1, 0], [3, 0], [2, 0]], dtype=np.float32)
    after = np.array([[0, 1], [0, 3], [2, 0]], dtype=np.float32)
    answers = [ClassAnswers(logits, logits.argmax(axis=1), truth) for logits in (before, after)]
    assert changed(*answers, most=5) == ([1, 0], 2)
    assert changed(*answers, most=1) == ([1], 2)


def test_bytes_count_weight_files_alone(tiny_checkpoint, tiny_model):
    place: Path = tiny_checkpoint("bert", ("negative", "positive"))
    assert torch_artifact(place, tiny_model()).bytes == (place / "model.safetensors").stat().st_size


def test_threads_are_those_of_the_other_runtimes():
    import torch

    from moss_rlhf.model.runtime import usable_cores

    before = torch.get_num_threads()
    try:
        assert measuring.same_threads() == usable_cores() == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def language_report(tiny_model, tiny_checkpoint, rows_of, tmp_path, monkeypatch):
    """A language model against one whose weights are a little off, measured for real but for the memory."""

    def compare(family, before=True):
        monkeypatch.setattr(measuring, "peak_memory", lambda *_, **__: 123)
        first, second = tiny_model(family), tiny_model(family)
        for parameter in second.network.parameters():
            parameter.data *= 1.01
        rows = encoded(first, rows_of(first.task)[:12])
        artifacts = [
            torch_artifact(tiny_checkpoint(family, ("negative", "positive")), model) for model in (first, second)
        ]
        spec = EvaluateSpec(batch_sizes=[1, 4], resamples=200, speed_rows=4, speed_seconds=0.1)
        measure = Measuring(rows, "test", tmp_path, spec, 0, Progress(quiet=True))
        return measure.compare(artifacts[0] if before else None, artifacts[1], None, None), first, second, rows

    return compare


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_language_model_is_judged_by_its_perplexity(language_report, family):
    report, first, second, rows = language_report(family)
    task = TASKS[first.task]
    values = [task.measure(model.network, rows, model.tokenizer)["perplexity"] for model in (first, second)]
    change = report["gain"]["metric"]
    assert (change["name"], change["lower_is_better"]) == ("perplexity", True)
    assert change["delta"] == pytest.approx(values[1] - values[0], rel=1e-6)
    assert 0 < change["p_value"] <= 1
    assert set(report["after"]["metrics"]) == {"perplexity", "token_accuracy"}
    assert set(report["after"]["throughput"]) == {"1", "4"}
    assert "confusion" not in report
    scores = [task.scores(model.network, rows, model.tokenizer) for model in (first, second)]
    moves = np.abs(np.subtract(*(score[:, 0] / score[:, 1] for score in scores)))
    furthest = int(moves.argmax())
    shown = report["moved"][0]
    assert len(report["moved"]) == 12
    assert shown["before"] == pytest.approx(np.exp(scores[0][furthest, 0] / scores[0][furthest, 1]))
    tokens = rows[furthest].get("labels") or rows[furthest]["input_ids"]
    assert shown["text"] == first.tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_language_model_without_a_before_has_no_gain(language_report):
    report, *_ = language_report("gpt2", before=False)
    assert (report["gain"], report["before"], report["moved"]) == (None, None, [])
