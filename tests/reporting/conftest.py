import math

import pytest

# parameters, bytes of weight files
BEFORE, REFERENCE, AFTER = (22_713_986, 90_900_000), (17_100_000, 68_400_000), (17_100_000, 17_150_000)


def measurement(artifact, runtime, split, accuracy, size):
    rows = 872
    parameters, weight_bytes = size
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / rows)
    metrics = {
        "accuracy": {"value": accuracy, "low": accuracy - half, "high": accuracy + half},
        "macro_f1": {"value": accuracy - 0.002, "low": accuracy - half - 0.002, "high": accuracy + half - 0.002},
    }
    return {
        "artifact": artifact,
        "runtime": runtime,
        "split": split,
        "metrics": metrics,
        "rows": rows,
        "parameters": parameters,
        "nonzero": parameters,
        "macs_per_token": parameters // 2,
        "bytes": weight_bytes,
    }


def with_speed(base, latency, throughput, peak):
    milliseconds = {batch: {"p50": value, "p95": 1.2 * value} for batch, value in latency.items()}
    return {**base, "latency_ms": milliseconds, "throughput": throughput, "peak_memory_bytes": peak}


def history(steps, start):
    train = [
        {
            "step": step,
            "epoch": step / 100,
            "loss": start * math.exp(-step / 120) + 0.05 * math.sin(step) + 0.2,
            "learning_rate": 5e-5 * min(step / 30, (steps - step) / (steps - 30)),
        }
        for step in range(10, steps + 1, 10)
    ]
    validation = [
        {
            "step": step,
            "epoch": step / 100,
            "loss": start * math.exp(-step / 150) + 0.3,
            "accuracy": 0.9 - 0.3 * math.exp(-step / 70),
            "macro_f1": 0.89 - 0.3 * math.exp(-step / 70),
        }
        for step in range(100, steps + 1, 100)
    ]
    return {"train": train, "validation": validation}


def stage(kind, seconds, flops, facts, *, accuracy, points=None, resumed=False):
    after = measurement(f"stages/{kind}/model", "PyTorch float32", "validation", accuracy, REFERENCE)
    return {
        "kind": kind,
        "name": f"{kind}-3f9a",
        "seconds": seconds,
        "peak_memory_bytes": 1_610_000_000,
        "flops": flops,
        "resumed": resumed,
        "facts": facts,
        "history": points,
        "measurement": after,
    }


def split(rows, dropped):
    return {
        "rows": rows,
        "dropped": dropped,
        "classes": {"negative": rows // 2, "positive": rows - rows // 2},
        "duplicates": 3,
        "layout": "csv, header, comma: text ← review, label ← sentiment",
        "tokens": {"mean": 24.6, "p99": 61, "max": 128, "cut_share": 0.004},
    }


def build_report():
    """A report as a run writes it: MiniLM, narrowed, shortened, distilled, quantized."""
    before = with_speed(
        measurement("stages/01-finetune-3f9a/model", "PyTorch float32", "test", 0.871, BEFORE),
        {"1": 8.21, "8": 37.4, "32": 225.0},
        {"1": 121.8, "8": 213.9, "32": 142.2},
        612_000_000,
    )
    reference = with_speed(
        measurement("onnx/reference.onnx", "ONNX Runtime float32", "test", 0.866, REFERENCE),
        {"1": 2.31, "8": 16.2, "32": 92.3},
        {"1": 432.9, "8": 493.8, "32": 346.7},
        301_000_000,
    )
    after = with_speed(
        measurement("onnx/model.onnx", "ONNX Runtime int8", "test", 0.865, AFTER),
        {"1": 0.902, "8": 8.71, "32": 53.6},
        {"1": 1108.6, "8": 918.5, "32": 597.2},
        198_000_000,
    )
    heads = {"kept_heads": [[0, 2, 3, 5, 8, 9]] * 5 + [[1, 2, 4, 6, 7, 11]], "feed_forward_width": [768] * 12}
    return {
        "recipe": {
            "task": "text-classification",
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "data": {"train": "reviews.csv", "test": "reviews-test.csv"},
            "stages": [{"finetune": {"epochs": 3}}, {"narrow": {"heads": 0.5}}, {"quantize": {}}],
            "evaluate": {"batch_sizes": [1, 8, 32], "confidence": 0.95, "resamples": 2000},
            "output": "runs/评论",
        },
        "fingerprint": "9c1185a5c5e9fc54612808977ee8f548b2258d31",
        "seed": 0,
        "task": "text-classification",
        "machine": {
            "processor": "AMD EPYC 9V74",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_700_000_000,
            "system": "Linux 6.8",
            "int8": "avx512_vnni: int8 is fast here",
        },
        "versions": {"moss-rlhf": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0"},
        "data": {
            "train": split(6920, {"also in test": 12, "the same text with another label": 4}),
            "validation": split(769, {"also in test": 1}),
            "test": split(872, {}),
        },
        "notes": ["17 rows were dropped from train and validation because their text also stands in test."],
        "protocol": [
            "Before and after got identical tokenized batches, in the same order and with the same padding.",
            "Rounds alternate between the models after a warm-up; the medians of 30 rounds are given.",
            "Tokenization is not timed.",
        ],
        "before": before,
        "after": after,
        "reference": reference,
        "gain": {
            "metric": {"name": "accuracy", "delta": -0.006, "low": -0.017, "high": 0.004, "p_value": 0.28},
            "size": 90_900_000 / 17_150_000,
            "speedup": {"1": 9.1, "8": 4.29, "32": 4.2},
            "latency": {"1": 9.1, "8": 4.29, "32": 4.2},
        },
        "cost": {
            "seconds": 2103.0,
            "flops": 1.24e15,
            "dense_seconds": 1168.0,
            "dense_flops": 6.2e14,
            "seconds_ratio": 1.8,
            "flops_ratio": 2.0,
        },
        "stages": [
            stage("finetune", 1168.0, 6.2e14, {"epochs": 3}, accuracy=0.874, points=history(650, 0.6), resumed=True),
            stage("narrow", 41.2, 1.1e13, {**heads, "score": "fisher", "rows_scored": 1024}, accuracy=0.793),
            stage("finetune", 889.4, 6.1e14, {"teacher": "parent"}, accuracy=0.868, points=history(500, 0.4)),
            stage("quantize", 4.4, None, {"tensors": 37, "error": {"mean": 0.00213, "max": 0.0312}}, accuracy=0.867),
        ],
        "confusion": {
            "labels": ["negative", "正面"],
            "before": [[369, 59], [53, 391]],
            "after": [[362, 66], [52, 392]],
        },
        "changed": [
            {"text": "it 's slow -- very, very slow.", "label": "negative", "before": "negative", "after": "正面"},
            {"text": "unflinchingly bleak and desperate", "label": "negative", "before": "正面", "after": "negative"},
            {"text": "这部电影太长了，但是结尾很好。" * 30, "label": "正面", "before": "正面", "after": "negative"},
        ],
        "changed_total": 57,
    }


@pytest.fixture
def report():
    return build_report()
