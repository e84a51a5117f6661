"""A recipe that ends in int4 for vLLM: measured in PyTorch, shipped packed, and the report says so."""

import csv

import pytest
import torch

from moss_rlhf import load, run

pytestmark = pytest.mark.usefixtures("one_core", "memory_not_measured")


def test_int4_is_shipped_for_vllm_and_measured_in_pytorch(rows, tiny_checkpoint, tmp_path):
    pytest.importorskip("compressed_tensors")
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    recipe = {
        "task": "text-classification",
        "model": str(tiny_checkpoint("bert")),
        "data": {"train": str(tmp_path / "train.csv"), "validation": 0.3},
        "stages": [
            {"finetune": {"epochs": 1, "learning_rate": 2e-3}},
            {"quantize": {"scheme": "int4", "group_size": 8, "method": "awq", "rows": 16}},
        ],
        "evaluate": {"batch_sizes": [2], "resamples": 200, "speed_seconds": 0.1},
        "export": ["compressed-tensors"],
        "output": str(tmp_path / "run"),
    }
    report = run(recipe)
    facts = report["exports"]["compressed-tensors"]
    assert report["after"]["runtime"] == "PyTorch float32"
    assert report["after"]["artifact"] == "model"
    assert any("for vLLM, which does not run here: 'after' is the checkpoint" in note for note in report["notes"])
    assert report["stages"][-1]["facts"]["scaled"] == {"attention.value": 3}
    assert facts["difference_to_pytorch"] <= 1e-6
    assert facts["bytes"] < report["after"]["bytes"]

    from transformers import AutoModelForSequenceClassification

    packed = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "compressed-tensors").eval()
    model = load(tmp_path / "run" / "model")
    inputs = model.tokenizer(["a lovely film , and we would know"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(packed(**inputs).logits, model.network.eval()(**inputs).logits, rtol=1e-4, atol=1e-6)
