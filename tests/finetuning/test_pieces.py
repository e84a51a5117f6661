"""A batch in pieces = the batch at once; one that does not fit is cut and tried again."""

import pytest
import torch

from moss_rlhf.errors import MachineError, ModelError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.objective import Objective

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "precision": "float32"}
TASKS = {"bert": "text-classification", "llama": "text-generation", "bart": "translation"}
FAMILIES = {"bert": STILL, "llama": {}, "bart": {"dropout": 0.0}}


def _trained(tiny_model, rows, family, **settings):
    model = tiny_model(family, **FAMILIES[family])
    training = finetune(model, rows[:24], rows[:4], **(SETTINGS | settings))
    return model, training


@pytest.fixture
def gradients(monkeypatch):
    """Every step's gradients in place of the step: AdamW's first step is their sign, which noise around 0 decides."""
    seen = []

    def record(optimizer, closure=None):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        seen.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    return seen


def _assert_same_gradients(seen):
    half = len(seen) // 2
    assert half == 3
    for one, other in zip(seen[:half], seen[half:], strict=True):
        assert all(torch.allclose(a, b, atol=1e-6, rtol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("micro", [1, 3])
def test_eight_at_once_is_eight_times_one(family, micro, gradients, tiny_model, rows_of):
    """Also where a language model's rows hold unequally many tokens, which averaging micro-batches would get wrong."""
    rows = rows_of(TASKS[family])
    _, training = _trained(tiny_model, rows, family)
    _, other = _trained(tiny_model, rows, family, micro_batch_size=micro)
    _assert_same_gradients(gradients)
    losses = [[point["loss"] for point in found.history["train"]] for found in (training, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_checkpointed_blocks_give_the_same_gradient(gradients, tiny_model, rows):
    _trained(tiny_model, rows, "bert")
    model, _ = _trained(tiny_model, rows, "bert", gradient_checkpointing=True)
    _assert_same_gradients(gradients)
    assert not model.network.is_activation_checkpointing


class _Small:
    """A machine that holds so many rows at once; whatever does not fit raises as PyTorch does."""

    def __init__(self, monkeypatch, rows, error):
        self.tried = []
        forward = Objective.__call__

        def limited(objective, network, batch):
            self.tried.append(len(batch["labels"]))
            if len(batch["labels"]) > rows:
                raise error
            return forward(objective, network, batch)

        monkeypatch.setattr(Objective, "__call__", limited)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_a_batch_that_does_not_fit_is_cut_and_stays_cut(error, monkeypatch, gradients, tiny_model, rows):
    _trained(tiny_model, rows, "bert")
    small = _Small(monkeypatch, 2, error)
    _trained(tiny_model, rows, "bert")
    _assert_same_gradients(gradients)
    assert small.tried[:3] == [8, 4, 2]
    assert set(small.tried[2:]) == {2}  # found out once


def test_a_row_that_does_not_fit_is_an_error(monkeypatch, tiny_model, rows):
    _Small(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MachineError, match=r"one row of \d+ tokens does not fit into memory"):
        _trained(tiny_model, rows, "bert")


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch, tiny_model, rows):
    _Small(monkeypatch, 0, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        _trained(tiny_model, rows, "bert")


def test_a_loss_that_is_not_finite_names_its_rows(monkeypatch, tiny_model, rows):
    def broken(objective, network, batch):
        loss = batch["labels"].float().mean()
        return loss * float("nan") if 7 in batch["row"].tolist() else loss + network.classifier.weight.sum() * 0

    monkeypatch.setattr(Objective, "__call__", broken)
    with pytest.raises(ModelError, match=r"on rows [\d, ]*\b7\b"):
        _trained(tiny_model, rows, "bert", micro_batch_size=2)


def test_token_budget_trains_every_row_once(tiny_model, rows):
    _, training = _trained(tiny_model, rows, "bert", batch_tokens=64)
    assert training.facts["steps"] > 3
