"""Packed documents give the loss and the gradient of padded ones, or the family is refused."""

import pytest
import torch

from moss_rlhf.errors import MachineError, ModelError, RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.running import trackers
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.replay import without_cache
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

TASK = TASKS["text-generation"]
DECODERS = [name for name, family in FAMILIES.items() if family.kind == "decoder"]


def _loss_and_gradient(model, batch):
    given = TASK.inputs(model.network, batch)
    with without_cache(model.network):
        loss = TASK.loss(model.network(**given).logits, batch["labels"])
    model.network.zero_grad()
    loss.backward()
    return float(loss.detach()), [parameter.grad.clone() for parameter in model.network.parameters()]


@pytest.mark.parametrize("family", [name for name in DECODERS if name != "opt"])
def test_packed_is_padded(family, tiny_model, rows_of):
    model = tiny_model(family)
    model.network.eval()
    rows = [dict(row) for row in encoded(model, rows_of("text-generation")[::7])]
    assert len({len(row["input_ids"]) for row in rows}) > 1
    packed, padded = TASK.pack(rows), TASK.collate(rows, model.tokenizer)
    assert TASK.targets(packed["labels"]) == TASK.targets(padded["labels"])
    loss, gradient = _loss_and_gradient(model, packed)
    expected, expected_gradient = _loss_and_gradient(model, padded)
    assert loss == pytest.approx(expected, rel=1e-5)
    for found, wanted in zip(gradient, expected_gradient, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6, rtol=1e-3)


def test_it_trains_on_every_row(tiny_model, rows_of):
    rows = rows_of("text-generation")
    training = finetune(
        tiny_model("llama"), rows, rows[:8], epochs=4, learning_rate=3e-3, packing=True, precision="float32"
    )
    assert training.history["validation"][-1]["perplexity"] < training.history["validation"][0]["perplexity"]


def test_a_family_that_sees_across_documents_is_refused(tiny_model, rows_of):
    with pytest.raises(ModelError, match="a network of type opt lets packed documents see one another"):
        finetune(tiny_model("opt"), rows_of("text-generation"), rows_of("text-generation")[:8], packing=True)


def test_a_task_without_documents_is_refused(tiny_model, rows):
    with pytest.raises(ModelError, match="text-classification has no documents to pack"):
        finetune(tiny_model(), rows, rows[:8], packing=True)


@pytest.mark.parametrize("given", [{"micro_batch_size": 2}, {"distill": {"hidden": 1.0}}], ids=str)
def test_what_packed_documents_can_not_do_is_refused(given, tiny_model, rows_of):
    rows = rows_of("text-generation")
    with pytest.raises(RecipeError, match="a packed batch is one row"):
        finetune(tiny_model("gpt2"), rows, rows[:8], packing=True, **given)


def test_trackers_are_known_and_installed(monkeypatch):
    with pytest.raises(RecipeError, match="unknown tracker 'tensorbord'; did you mean 'tensorboard'"):
        trackers(["tensorbord"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MachineError, match="pip install wandb"):
        trackers(["wandb"])
