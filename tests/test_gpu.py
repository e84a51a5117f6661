"""On a GPU, where there is one: what a method does on the processor it does there too, and the network comes back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import moss_rlhf
from moss_rlhf.model.device import on_accelerator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = {
    "wanda": lambda model, rows: moss_rlhf.prune(model, rows, method="wanda", sparsity=0.5),
    "sparsegpt": lambda model, rows: moss_rlhf.prune(model, rows, method="sparsegpt", sparsity=0.5),
    "outliers": lambda model, rows: moss_rlhf.prune(model, rows, method="wanda", sparsity=0.5, allocation="outliers"),
    "sensitivity": lambda model, rows: moss_rlhf.prune(model, rows, sparsity=0.5, allocation="sensitivity"),
    "nearest": lambda model, rows: moss_rlhf.quantize(model),
    "gptq": lambda model, rows: moss_rlhf.quantize(model, rows, method="gptq"),
    "awq": lambda model, rows: moss_rlhf.quantize(model, rows, method="awq", scheme="int4", group_size=8),
    "smooth": lambda model, rows: moss_rlhf.quantize(model, rows, smooth=0.5),
    "fisher": lambda model, rows: moss_rlhf.narrow(model, rows, heads=0.5, feed_forward=0.5),
    "budget": lambda model, rows: moss_rlhf.narrow(model, rows, macs=0.5, multiple_of=4),
    "activation": lambda model, rows: moss_rlhf.narrow(model, rows, heads=0.5, feed_forward=0.5, score="activation"),
    "hidden": lambda model, rows: moss_rlhf.narrow(model, rows, hidden=0.5),
    "drop": lambda model, rows: moss_rlhf.shorten(model, rows, remove=1, how="drop"),
    "fit": lambda model, rows: moss_rlhf.shorten(model, rows, remove=1, how="merge_least_squares"),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cached": {"phases": [{"train": ["head"], "epochs": 2}], "epochs": None, "cache": "required"},
    "gradual": {"unfreeze": "gradual", "layer_decay": 0.9},
    "movement": {"movement": {"sparsity": 0.5}},
    "rounded": {"quantization_aware": {"scheme": "int8"}},
    "adapter": {"adapter": {"kind": "lora", "rank": 2}},
    "averaged": {"average": {"best": 2}, "evaluations_per_epoch": 3},
    "r_drop": {"loss": {"r_drop": 1.0, "class_weights": "balanced"}},
    "mixup": {"mixup": 0.4},
    "penalties": {"l1": 1e-3, "l2": 1e-4, "l2_start": 1e-2},
    "pieces": {"micro_batch_size": 3, "gradient_checkpointing": True},
    "compiled": {"compile": "on"},
}


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_does_the_same_on_both(method, family, tiny_model, rows_of):
    if method == "smooth" and family == "bert":
        pytest.skip("post-norm")
    here = tiny_model(family)
    rows = rows_of(here.task)
    there = copy.deepcopy(here)
    METHODS[method](here, rows)
    with on_accelerator(there.network):
        assert next(there.network.parameters()).is_cuda
        METHODS[method](there, rows)
        assert all(parameter.is_cuda for parameter in there.network.parameters())
    apart = total = 0
    for ours, theirs in zip(here.network.parameters(), there.network.parameters(), strict=True):
        assert theirs.device.type == "cpu"
        assert ours.shape == theirs.shape
        apart += int((~torch.isclose(ours, theirs, rtol=1e-2, atol=1e-3)).sum())
        total += ours.numel()
    assert apart < 0.02 * total  # a tie that falls the other way moves what comes after it


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_a_training_ends_on_the_processor(options, tiny_model, rows):
    model = tiny_model("bert")
    given = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3} | options
    moss_rlhf.finetune(model, rows, rows[:8], **given)
    assert all(
        parameter.device.type == "cpu" and parameter.isfinite().all() for parameter in model.network.parameters()
    )


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_teacher_is_asked_there(family, tiny_model, rows_of):
    student, teacher = tiny_model(family), tiny_model(family)
    options = {} if family == "t5" else {"hidden": 1.0, "attention": 1.0}
    rows = rows_of(student.task)
    moss_rlhf.finetune(student, rows, rows[:8], epochs=1, teacher=teacher, distill=options)
    assert all(parameter.device.type == "cpu" for parameter in student.network.parameters())


@pytest.mark.parametrize("family", ["bert", "llama", "bart"])
def test_pretraining(family, tiny_model, rows):
    model = tiny_model(family)
    facts = moss_rlhf.pretrain(model, [row["text"] for row in rows], epochs=2, max_length=16).facts
    assert facts["after"] and next(model.network.parameters()).device.type == "cpu"


def test_states_beyond_memory_come_back_to_the_gpu(tiny_model, rows_of):
    from moss_rlhf.model.replay import Replay
    from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
    from moss_rlhf.tasks.loading import encoded

    model = tiny_model("bert")
    rows = rows_of(model.task)
    model.network.cuda()
    batches = list(labelled_batches(model, calibration_rows(encoded(model, rows), 8, 0)))
    with Replay(model.network, batches, cache_bytes=0) as replay:
        for position in range(len(replay.blocks)):
            replay.advance(position)
        logits = replay.output(0).logits
    inputs, _ = batches[0]
    with torch.no_grad():
        assert torch.allclose(logits, model.network(**inputs).logits, atol=1e-5)
