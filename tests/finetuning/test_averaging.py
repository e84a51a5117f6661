"""The mean of checkpoints: which are taken, that it is their mean, and that a worse one is not kept."""

import pytest
import torch
from safetensors.torch import load_file

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.averaging import steps_to_average
from moss_rlhf.finetuning.options import Averaging
from moss_rlhf.strategy import Best, Judge

LOG = [
    {"step": 10, "eval_accuracy": 0.7, "eval_loss": 0.6},
    {"step": 15, "loss": 0.5, "learning_rate": 0.1},
    {"step": 20, "eval_accuracy": 0.9, "eval_loss": 0.5},
    {"step": 30, "eval_accuracy": 0.9, "eval_loss": 0.4},
    {"step": 40, "eval_accuracy": 0.8, "eval_loss": 0.3},
]
SETTINGS = {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32"}


def test_the_last_and_the_best_by_hand():
    judge = Judge("accuracy")
    assert steps_to_average(LOG, Averaging(last=2), judge) == [30, 40]
    assert steps_to_average(LOG, Averaging(best=2), judge) == [20, 30]
    assert steps_to_average(LOG, Averaging(best=3), judge) == [20, 30, 40]
    assert steps_to_average(LOG, Averaging(best=1), Judge("loss", lower_is_better=True)) == [40]
    assert steps_to_average(LOG, Averaging(best=2), Judge("accuracy", since=30)) == [30, 40]


def test_a_judge_reads_the_best_of_a_log():
    assert Judge("accuracy").best(LOG) == Best(0.9, 0.4, step=30, waited=1)
    assert Judge("accuracy", since=40).best(LOG) == Best(0.8, 0.3, step=40, waited=0)


@pytest.mark.parametrize("average", [{"last": 3}, {"best": 2}])
def test_the_mean_is_the_mean_or_the_best_is_kept(average, tiny_model, rows, tmp_path):
    model = tiny_model()
    facts = finetune(model, rows, rows[::2], average=average, workspace=tmp_path, **SETTINGS).facts
    steps = facts["average"]["of_steps"]
    files = [load_file(tmp_path / f"kept-{step}.safetensors") for step in steps]
    assert len(files) == next(iter(average.values()))
    assert len(list(tmp_path.glob("kept-*"))) == len(files)  # the others are dropped on the way
    best = load_file(tmp_path / "best.safetensors")
    for name, value in model.network.state_dict().items():
        mean = torch.stack([file[name].double() for file in files]).mean(dim=0)
        wanted = mean.to(value.dtype) if facts["average"]["kept"] else best[name]
        assert torch.equal(value, wanted), name


def test_both_or_neither_is_refused(tiny_model, rows):
    for average in ({}, {"last": 2, "best": 2}):
        with pytest.raises(RecipeError, match="give either last or best"):
            finetune(tiny_model(), rows, rows, average=average)


def test_the_metric_decides_what_is_best(tiny_model, rows):
    training = finetune(tiny_model(), rows, rows[:9], metric="loss", **SETTINGS)
    losses = {point["step"]: point["loss"] for point in training.history["validation"]}
    assert training.facts["best_step"] == min(losses, key=losses.__getitem__)
    assert training.facts["best_validation_loss"] == min(losses.values())


def test_a_metric_that_the_task_does_not_have_is_refused(tiny_model, rows):
    with pytest.raises(RecipeError, match="text-classification has no metric 'f1'"):
        finetune(tiny_model(), rows, rows, metric="f1")
