"""The whole story on a tiny random model and the Chinese demo data: from a file in gb18030 to a report in Chinese."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

DEMO = files("moss_rlhf") / "data" / "demo"
BATCH_SIZES = [1, 4]
MEASUREMENT = {
    "artifact", "runtime", "metrics", "rows", "parameters", "nonzero", "macs_per_token", "bytes",
    "latency_ms", "throughput", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def chinese_run(one_core, tiny_checkpoint, tmp_path_factory):
    """(directory, report) of a run through every kind of stage."""
    from moss_rlhf import run

    place = tmp_path_factory.mktemp("chinese")
    train = place / "train.csv"
    train.write_bytes((DEMO / "chinese-train.csv").read_text(encoding="utf-8").encode("gb18030"))
    recipe = {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert", blocks=4)),
        "data": {
            "train": {"file": str(train), "encoding": "gb18030"},
            "validation": 0.2,
            "test": str(DEMO / "chinese-test.csv"),
        },
        "stages": [
            {"finetune": {"epochs": 2, "learning_rate": 2e-3, "unfreeze": "gradual", "layer_decay": 0.9}},
            {"prune": {"sparsity": 0.3}},
            {"narrow": {"heads": 0.5, "feed_forward": 0.3, "rows": 64}},
            {"shorten": {"remove": 1, "rows": 64}},
            {"finetune": {"epochs": 1, "learning_rate": 2e-3, "distill": {"teacher": "parent"}}},
            {"quantize": {}},
        ],
        "evaluate": {"batch_sizes": BATCH_SIZES, "resamples": 200, "speed_seconds": 0.2},
        "export": ["onnx"],
        "output": str(place / "run"),
    }
    return place / "run", run(recipe)


def test_report_has_the_public_keys(chinese_run):
    place, report = chinese_run
    assert json.loads((place / "report.json").read_text(encoding="utf-8")) == report
    assert set(report) >= {
        "recipe", "fingerprint", "seed", "task", "machine", "versions", "data", "before", "after", "gain", "stages",
    }  # fmt: skip
    assert set(report["data"]) == {"train", "validation", "test"}
    for facts in report["data"].values():
        assert set(facts) >= {"rows", "dropped", "tokens"}
        assert set(facts["tokens"]) >= {"mean", "p99"}
    sizes = {str(size) for size in BATCH_SIZES}
    for moment in ("before", "after"):
        assert set(report[moment]) >= MEASUREMENT
        assert set(report[moment]["latency_ms"]) == set(report[moment]["throughput"]) == sizes
        assert set(report[moment]["metrics"]["accuracy"]) == {"value", "low", "high"}
        assert report[moment]["peak_memory_bytes"] > 10**7
    assert set(report["gain"]["metric"]) == {"name", "delta", "low", "high", "p_value"}
    assert set(report["gain"]["speedup"]) == sizes
    for stage in report["stages"]:
        assert set(stage) >= {"kind", "name", "seconds", "facts", "measurement"}
        assert set(stage["measurement"]) >= MEASUREMENT - {"latency_ms", "throughput", "peak_memory_bytes"}


def test_every_row_of_the_data_is_counted(chinese_run):
    _, report = chinese_run
    rows = {name: facts["rows"] for name, facts in report["data"].items()}
    dropped = sum(sum(facts["dropped"].values()) for facts in report["data"].values())
    assert rows["train"] + rows["validation"] + dropped == 150
    assert rows["test"] == report["after"]["rows"] == report["before"]["rows"] == 50


def test_gain_is_before_over_after(chinese_run):
    _, report = chinese_run
    before, after, gain = report["before"], report["after"], report["gain"]
    accuracy = [moment["metrics"]["accuracy"]["value"] for moment in (before, after)]
    assert gain["metric"]["delta"] == pytest.approx(accuracy[1] - accuracy[0])
    assert gain["size"] == before["bytes"] / after["bytes"]
    for size in map(str, BATCH_SIZES):
        assert gain["speedup"][size] == after["throughput"][size] / before["throughput"][size]


def test_every_stage_does_what_it_says(chinese_run):
    _, report = chinese_run
    kinds = ["finetune", "prune", "narrow", "shorten", "finetune", "quantize"]
    assert [stage["kind"] for stage in report["stages"]] == kinds
    measured = dict(enumerate(stage["measurement"] for stage in report["stages"]))
    parameters = [measured[index]["parameters"] for index in range(6)]
    assert parameters[0] == parameters[1] > parameters[2] > parameters[3] == parameters[4] == parameters[5]
    assert measured[1]["nonzero"] < measured[0]["nonzero"] == measured[0]["parameters"]
    assert measured[4]["nonzero"] <= measured[4]["parameters"] * 0.95  # zeros survive narrowing and training
    assert measured[2]["macs_per_token"] < measured[1]["macs_per_token"]
    assert [stage["resumed"] for stage in report["stages"]] == [False] * 6


def test_bytes_are_those_of_the_weight_files(chinese_run):
    place, report = chinese_run
    for moment in ("before", "after"):
        artifact = place / report[moment]["artifact"]
        weights = [artifact] if artifact.is_file() else list(artifact.glob("*.safetensors"))
        assert report[moment]["bytes"] == sum(file.stat().st_size for file in weights) > 0
    assert report["after"]["artifact"] == "onnx/model.onnx"


def test_the_page_speaks_chinese(chinese_run):
    place, report = chinese_run
    page = (place / "report.html").read_text(encoding="utf-8")
    assert "好评" in page
    assert "差评" in page
    for row in report["changed"]:
        assert row["text"][:10] in page
        assert row["before"] != row["after"]
    assert report["confusion"]["labels"] == ["好评", "差评"] or report["confusion"]["labels"] == ["差评", "好评"]


def test_label_names_stand_in_every_config(chinese_run):
    place, _ = chinese_run
    for folder in [place / "model", place / "onnx", *(place / "stages").glob("*/model")]:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert set(config["id2label"].values()) == {"好评", "差评"}, folder


def test_plain_onnxruntime_gives_the_reported_accuracy(chinese_run):
    """A stranger's script: a tokenizer, a session, a csv file; nothing of ours."""
    import csv

    import onnxruntime
    from tokenizers import Tokenizer

    place, report = chinese_run
    session = onnxruntime.InferenceSession(str(place / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(place / "onnx" / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(report["data"]["test"]["tokens"]["max_length"])
    labels = json.loads((place / "onnx" / "config.json").read_text(encoding="utf-8"))["id2label"]
    inputs = [value.name for value in session.get_inputs()]
    assert set(inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    assert session.get_outputs()[0].name == "logits"

    right = 0
    with Path(str(DEMO / "chinese-test.csv")).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        encoding = tokenizer.encode(row["text"])
        columns = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
        columns["token_type_ids"] = encoding.type_ids
        feed = {name: np.array([columns[name]], dtype=np.int64) for name in inputs}
        right += labels[str(int(session.run(None, feed)[0].argmax()))] == row["label"]
    assert abs(right / len(rows) - report["after"]["metrics"]["accuracy"]["value"]) <= 1 / len(rows)


def test_distillation_and_stages_cost_what_they_take(chinese_run):
    _, report = chinese_run
    stages, cost = report["stages"], report["cost"]
    assert cost["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages))
    assert cost["flops"] == pytest.approx(sum(stage["flops"] for stage in stages))
    assert cost["dense_flops"] == stages[0]["flops"] < cost["flops"]


def test_log_is_one_object_a_line_and_tells_the_story(chinese_run):
    place, _ = chinese_run
    events = [json.loads(line) for line in (place / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    names = [event["event"] for event in events if event["event"] in ("stage started", "stage finished", "finished")]
    assert names == ["stage started", "stage finished"] * 6 + ["finished"]


def test_nothing_half_written_stays(chinese_run):
    place, _ = chinese_run
    assert not list(place.rglob("*.partial"))
    assert not list(place.rglob("work/checkpoint-*"))
    assert not list(place.rglob("training_args.bin"))
