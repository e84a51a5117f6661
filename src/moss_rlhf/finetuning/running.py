"""Run a plan: the loop around the Trainer, from its arguments to the best weights and the facts."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_model
from torch import nn
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from moss_rlhf.errors import Interrupted, MachineError, RecipeError, nearest
from moss_rlhf.files import CURVES
from moss_rlhf.finetuning.averaging import load_average, steps_to_average
from moss_rlhf.finetuning.compiling import Compile, compile_where_it_pays, undo
from moss_rlhf.finetuning.dropout import quick_dropout
from moss_rlhf.finetuning.heap import kept_memory
from moss_rlhf.finetuning.options import Averaging
from moss_rlhf.finetuning.pieces import Pieces
from moss_rlhf.finetuning.sampling import EpochBatches
from moss_rlhf.finetuning.trainer import BEST, Conductor, LayerwiseTrainer, Plan, checkpoints
from moss_rlhf.model.processor import fast_bfloat16, processor_flags
from moss_rlhf.model.replay import without_cache
from moss_rlhf.progress import Progress
from moss_rlhf.strategy import Judge
from moss_rlhf.tasks import Task

_LOGGED_POINTS = 60  # of the loss, for the chart
_TIMED_BATCHES = 5  # where compiling is weighed
TRACKERS = (CURVES, "mlflow", "wandb", "trackio")
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Training:
    """What a fine-tuning did.

    history   {"train": [{step, epoch, loss, learning_rate}], "validation": [{step, epoch, loss, metric}]}
    flops     operations of forward and backward, padding included.
    """

    facts: dict[str, Any]
    history: dict[str, list[dict[str, float]]]
    flops: float


def evaluation_steps(steps_per_epoch: int, epochs: int, per_epoch: int) -> frozenset[int]:
    """The steps after which validation is measured: `per_epoch` times an epoch, evenly, and after the last one."""
    evaluations = epochs * min(per_epoch, steps_per_epoch)
    total = epochs * steps_per_epoch
    return frozenset(round(total * count / evaluations) for count in range(1, evaluations + 1))


def uses_bfloat16(precision: Precision) -> bool:
    """Whether training runs in bfloat16 autocast: as told, or where the hardware has it."""
    if precision == "auto":
        return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else fast_bfloat16(processor_flags())
    return precision == "bfloat16"


def trackers(names: Sequence[str]) -> list[str]:
    """The trackers, each of which is installed.

    raises   RecipeError on an unknown one; MachineError where its package is missing.
    """
    for name in names:
        if name not in TRACKERS:
            raise RecipeError(f"finetune.report_to: unknown tracker {name!r}; {nearest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise MachineError(f"finetune.report_to: {name} is not installed. Run: pip install {name}")
    return list(names)


def judge_of(task: Task, metric: str | None, since: int = 0) -> Judge:
    """By which of the task's metrics checkpoints are compared, from step `since` on.

    raises   RecipeError where the task does not have it.
    """
    known = ["loss", *task.metrics]
    name = metric or task.metric
    if name not in known:
        raise RecipeError(f"finetune.metric: {task.name} has no metric {name!r}; {nearest(name, known)}")
    return Judge(name, name == "loss" or name in task.lower_is_better, since)


@contextmanager
def training_folder(workspace: str | Path | None) -> Iterator[Path]:
    """Where checkpoints go; without a workspace, a folder that is gone at the end."""
    if workspace is not None:
        place = Path(workspace)
        place.mkdir(parents=True, exist_ok=True)
        yield place
    else:
        with tempfile.TemporaryDirectory(prefix="moss-") as folder:
            yield Path(folder)


@dataclass(frozen=True)
class Loop:
    """How the Trainer goes over the rows, whatever is learned of them.

    folder   where checkpoints are written, and looked for.
    pieces   how a batch is cut where memory does not hold it.
    curves   where TensorBoard's files go; None: where it puts them itself, runs/ in the working directory.
    """

    folder: Path
    batches: EpochBatches
    epochs: int
    batch_size: int
    max_gradient_norm: float
    bfloat16: bool
    seed: int
    save_every_seconds: float
    progress: Progress
    title: str = "fine-tuning"
    pieces: Pieces = field(default_factory=Pieces)
    checkpointing: bool = False
    compile: Compile = "off"
    report_to: Sequence[str] = ()
    curves: Path | None = None


def train_network(
    network: Any,
    plan: Plan,
    loop: Loop,
    *,
    train: Any,
    evaluator: Callable[[], dict[str, float]],
    collate: Callable[[Any], Any],
) -> Training:
    """Train `network` by a plan, from the folder's last checkpoint on, and leave the weights of its best evaluation.

    train       the rows, by position.
    evaluator   measures the network on validation: {"loss", metric: value}.
    collate     from rows to a batch.
    raises      Interrupted after Ctrl-C, once a checkpoint is written.
    """
    trainer = LayerwiseTrainer(
        plan=plan,
        evaluator=evaluator,
        batches=loop.batches,
        pieces=loop.pieces,
        progress=loop.progress,
        network=network,
        arguments=_arguments(loop, plan.steps),
        collate=collate,
        train=train,
    )
    if CURVES in loop.report_to:
        trainer.add_callback(_tensorboard(loop.curves))
    facts = _compiled_by_time(trainer, loop) | _run(trainer, loop)
    return _training_of(trainer, loop.bfloat16, facts)


def _arguments(loop: Loop, steps: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(loop.folder),
        num_train_epochs=loop.epochs,
        per_device_train_batch_size=loop.batch_size,
        max_grad_norm=loop.max_gradient_norm,
        bf16=loop.bfloat16,
        activation_checkpointing=loop.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        seed=loop.seed,
        eval_strategy="no",
        save_strategy="no",  # the conductor decides
        logging_steps=max(1, steps // _LOGGED_POINTS),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[name for name in loop.report_to if name != CURVES],  # whose files would go with the folder
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _tensorboard(place: Path | None) -> TensorBoardCallback:
    """Sends curves to TensorBoard: to `place`, or where the environment says."""
    from torch.utils.tensorboard import SummaryWriter

    given = os.environ.get("TENSORBOARD_LOGGING_DIR") or place
    return TensorBoardCallback(SummaryWriter(None if given is None else str(given)))


def _compiled_by_time(trainer: LayerwiseTrainer, loop: Loop) -> dict[str, Any]:
    """Compile the network, or leave it, by the time of a few real batches."""

    def step(rows: Sequence[int]) -> None:
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
        with trainer.compute_loss_context_manager():
            loss = trainer.plan.objective(trainer.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    some = list(itertools.islice(trainer.batches, _TIMED_BATCHES))
    trainer.model.train()
    return compile_where_it_pays(trainer.model, loop.compile, some, step, trainer.plan.steps, loop.folder)


def _run(trainer: LayerwiseTrainer, loop: Loop) -> dict[str, Any]:
    """Run to the end or to an interruption; leaves the best weights and returns the companions' facts."""
    shutil.rmtree(loop.folder / "partial", ignore_errors=True)  # a killed run's half-written checkpoint
    last = checkpoints(loop.folder)[-1:]
    set_seed(trainer.args.seed)
    with without_cache(trainer.model), _swift(trainer), loop.progress.bar(loop.title, trainer.plan.steps) as bar:
        conductor = Conductor(trainer, bar, loop.save_every_seconds)
        trainer.add_callback(conductor)
        try:
            with conductor.catching_interrupt():
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        finally:
            trainer.plan.companions.leave()
            for group in trainer.plan.groups:
                group.train(True)
            undo(trainer.model)
            if trainer.args.activation_checkpointing:
                trainer.model.activation_checkpointing_disable()
    if conductor.stop_requested.is_set():
        raise Interrupted("stopped at the last step; run again to go on from the checkpoint before")
    trainer.model.cpu()
    load_model(trainer.model, loop.folder / BEST)
    facts = _averaged(trainer, loop.folder) if trainer.plan.average else {}
    _undo_autocast(trainer.model)
    trainer.model.eval()
    return facts | trainer.plan.companions.finish()


def _undo_autocast(network: nn.Module) -> None:
    """Take off what accelerate has put around `forward` for bfloat16: what comes next computes as it says itself."""
    if vars(network).pop("_original_forward", None) is not None:
        del network.forward


@contextmanager
def _swift(trainer: LayerwiseTrainer) -> Iterator[None]:
    """What makes the same training faster on a processor; a compiled network is the compiler's."""
    if trainer.args.device.type != "cpu" or trainer.model._compiled_call_impl is not None:
        yield
        return
    with quick_dropout(), kept_memory():
        yield


def _averaged(trainer: LayerwiseTrainer, folder: Path) -> dict[str, Any]:
    """Leave the mean of the kept weights in the network, or the best ones where the mean is worse."""
    plan, log = trainer.plan, trainer.state.log_history
    steps = steps_to_average(log, plan.average or Averaging(last=1), plan.judge)
    load_average(trainer.model, steps, folder)
    found = {f"eval_{name}": value for name, value in trainer.evaluator().items()} | {"step": plan.steps}
    best = next(entry for entry in log if plan.judge.sees(entry) and entry["step"] == plan.judge.best(log).step)
    kept = plan.judge.rank(found) >= plan.judge.rank(best)
    if not kept:
        load_model(trainer.model, folder / BEST)
    name = plan.judge.metric
    return {"average": {"of_steps": steps, f"validation_{name}": found[f"eval_{name}"], "kept": kept}}


def _training_of(trainer: LayerwiseTrainer, bfloat16: bool, found: dict[str, Any]) -> Training:
    log = trainer.state.log_history
    judge = trainer.plan.judge
    best = judge.best(log)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    facts = {
        "steps": trainer.state.global_step,
        "best_step": best.step,
        f"best_validation_{judge.metric}": best.metric,
        "stopped_early": trainer.state.global_step < trainer.plan.steps,
        "precision": "bfloat16 autocast" if bfloat16 else "float32",
        "seconds": trainer.seconds,
        "examples_per_second": trainer.batches.rows * trainer.state.epoch / trainer.seconds,
        "learning_rates": {
            group.name: rate for group, rate in zip(trainer.plan.groups, trainer.plan.timetable.peaks, strict=True)
        },
    }
    history = {
        "train": [_pick(entry, "loss", "learning_rate") for entry in log if "learning_rate" in entry],
        "validation": [
            _pick(entry) | {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            for entry in evaluations
        ],
    }
    return Training(facts | found, history, float(trainer.state.total_flos))


def _pick(entry: Mapping[str, float], *names: str) -> dict[str, float]:
    return {name: entry[name] for name in ("step", "epoch", *names)}
