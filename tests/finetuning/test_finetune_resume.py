"""Interrupted after any step and resumed = never stopped: the same bits, the same curve."""

import importlib
import signal
from pathlib import Path

import pytest
import torch

from moss_rlhf.errors import Interrupted
from moss_rlhf.finetuning import finetune
from moss_rlhf.optimization import prune
from moss_rlhf.progress import Progress

STEPS = 8  # 2 epochs of 4 batches
NEVER = 0  # steps are counted from 1
TIMING = {"seconds", "examples_per_second"}
SETTINGS = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32", "save_every_seconds": 0.0}


@pytest.fixture(autouse=True)
def sparse_log(monkeypatch):
    """The loss is logged every third step, so that checkpoints fall between two logged points, as in long trainings."""
    monkeypatch.setattr(importlib.import_module("moss_rlhf.finetuning.running"), "_LOGGED_POINTS", 2.5)


@pytest.fixture
def train_to_the_end(tiny_model, rows):
    def train(variant: str, workspace: Path | None = None, progress: Progress | None = None, **settings: object):
        """Weights, history and facts of a training; `variant` names what is special about it."""
        model = tiny_model(blocks=2)
        options: dict[str, object] = {}
        if variant == "pruned":
            prune(model, sparsity=0.5)
        if variant == "distilled":
            options["teacher"] = tiny_model(blocks=3)
        if variant == "imitating":
            options |= {"teacher": tiny_model(blocks=3, hidden=24), "distill": {"hidden": 1.0, "attention": 1.0}}
        if variant == "gradual":
            options |= {"unfreeze": "gradual", "layer_decay": 0.8, "schedule": "slanted_triangular"}
        if variant == "random order":
            options["length_bucketing"] = False
        if variant in ("adam", "sgd", "adafactor"):
            options["optimizer"] = variant
        if variant == "penalties":
            options |= {"l1": 0.3, "l2": 0.1, "l2_start": 0.2, "loss": {"r_drop": 1.0, "label_smoothing": 0.1}}
        if variant == "movement":
            options |= {"movement": {"sparsity": 0.5, "begin": 0.2, "end": 0.8}, "teacher": tiny_model(blocks=3)}
        if variant == "soft movement":
            options["movement"] = {"mode": "soft", "regularisation": 10.0, "threshold": 0.4, "score_learning_rate": 0.1}
        if variant == "rounded":
            prune(model, sparsity=0.3)
            options["quantization_aware"] = {"scheme": "int8", "activations": True}
        if variant == "plateau":
            options |= {"schedule": {"name": "reduce_on_plateau", "factor": 0.3}, "evaluations_per_epoch": 4}
        if variant == "bfloat16":
            options["precision"] = "bfloat16"
        result = finetune(
            model, rows[:30], rows[30:], workspace=workspace, progress=progress, **(SETTINGS | options | settings)
        )
        facts = {name: value for name, value in result.facts.items() if name not in TIMING}
        return dict(model.network.state_dict()), result.history, facts, result.flops

    return train


def _assert_same(one, other):
    weights, *rest = one
    other_weights, *other_rest = other
    assert rest == other_rest
    for name, value in weights.items():
        assert torch.equal(value, other_weights[name]), name


def _stopping(acting, step):
    def act(done):
        if done == step:
            raise RuntimeError("stopped by the test")

    return acting(act)


VARIANTS = ["plain", "random order", "gradual", "distilled", "imitating", "pruned", "bfloat16"]
VARIANTS += ["adam", "sgd", "adafactor", "penalties", "plateau", "movement", "soft movement", "rounded"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_is_never_stopped(variant, train_to_the_end, acting, tmp_path):
    """Stopped twice: in the middle of the first epoch, and right after its end."""
    for step in (3, 6):
        with pytest.raises(RuntimeError, match="stopped by the test"):
            train_to_the_end(variant, tmp_path, _stopping(acting, step))
        assert [place.name for place in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{step - 1}"]
    _assert_same(train_to_the_end(variant, tmp_path), train_to_the_end(variant))


def test_resumed_after_every_step_is_never_stopped(train_to_the_end, acting, tmp_path):
    """A new process for each step, as it were."""
    for step in range(2, STEPS + 1):
        with pytest.raises(RuntimeError, match="stopped by the test"):
            train_to_the_end("plain", tmp_path, _stopping(acting, step))
    _assert_same(train_to_the_end("plain", tmp_path), train_to_the_end("plain"))


def test_a_resumed_training_goes_on_where_it_stopped(train_to_the_end, acting, tmp_path):
    with pytest.raises(RuntimeError):
        train_to_the_end("plain", tmp_path, _stopping(acting, 6))
    steps: list[int] = []
    train_to_the_end("plain", tmp_path, acting(steps.append))
    assert steps == [5, 6, 7, 8]  # the bar starts at the five steps that were saved


@pytest.mark.parametrize("step", [2, STEPS - 1, STEPS])
def test_interrupt_ends_the_step_saves_and_gives_the_handler_back(step, train_to_the_end, acting, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    progress = acting(lambda done: signal.raise_signal(signal.SIGINT) if done == step else None)
    with pytest.raises(Interrupted, match="run again to go on"):
        train_to_the_end("plain", tmp_path, progress, save_every_seconds=1e9)
    assert signal.getsignal(signal.SIGINT) is handler
    assert list(tmp_path.glob("checkpoint-*"))
    _assert_same(train_to_the_end("plain", tmp_path), train_to_the_end("plain"))


def test_the_handler_is_given_back_after_an_error_too(train_to_the_end, acting, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError):
        train_to_the_end("plain", tmp_path, _stopping(acting, 2))
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("save_every_seconds", [0.0, 1e9])
def test_a_training_that_ended_early_does_not_go_on(save_every_seconds, train_to_the_end, tmp_path):
    """Killed between its end and the mark that the stage is done: run again, it must end at the same step."""
    settings = {
        "epochs": 12,
        "early_stopping": {"patience": 2},
        "learning_rate": 1e-9,
        "save_every_seconds": save_every_seconds,
    }
    first = train_to_the_end("plain", tmp_path, **settings)
    assert first[2]["stopped_early"] is True
    _assert_same(train_to_the_end("plain", tmp_path, **settings), first)


def test_half_a_checkpoint_is_not_resumed_from(train_to_the_end, acting, tmp_path):
    with pytest.raises(RuntimeError):
        train_to_the_end("plain", tmp_path, _stopping(acting, 4))
    half = tmp_path / "partial" / "checkpoint-4"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    _assert_same(train_to_the_end("plain", tmp_path), train_to_the_end("plain"))
    assert not half.exists()


def test_checkpoints_hold_no_pickled_arguments(train_to_the_end, acting, tmp_path):
    with pytest.raises(RuntimeError):
        train_to_the_end("plain", tmp_path, _stopping(acting, 4))
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    names = {file.name for file in checkpoint.iterdir()}
    assert names == {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
    for name in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(checkpoint / name, weights_only=True)
