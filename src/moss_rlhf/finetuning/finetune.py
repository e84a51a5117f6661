"""Fine-tune a model on labelled rows: the driver that turns plain arguments into a `Plan` and runs it."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as cached
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model
from transformers import TrainingArguments, set_seed

from moss_rlhf.errors import DataError, Interrupted, ModelError
from moss_rlhf.finetuning.companions import Companion, Companions, KeptZeros
from moss_rlhf.finetuning.distillation import Teaching
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.finetuning.options import (
    Cache,
    CacheOption,
    Distillation,
    EarlyStopping,
    Phase,
    ScheduleName,
    cache_option,
    option,
)
from moss_rlhf.finetuning.planning import Layers, damage_of, epochs_of, phases_of, timetable_of
from moss_rlhf.finetuning.prefix_cache import PrefixCache, Rows, Still, frozen_at, plan_cache, states_bytes
from moss_rlhf.finetuning.sampling import EpochSampler
from moss_rlhf.finetuning.trainer import (
    BEST,
    SAVE_EVERY_SECONDS,
    Conductor,
    LayerwiseTrainer,
    Plan,
    best_of,
    checkpoints,
)
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.processor import fast_bfloat16, processor_flags
from moss_rlhf.model.reinitialise import draw_blocks
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.progress import Progress
from moss_rlhf.strategy import Unfreeze
from moss_rlhf.tasks import TASKS, Task, TextClassification
from moss_rlhf.tasks.loading import encoded

_LOGGED_POINTS = 60  # of the loss, for the chart
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


def finetune(
    model: Model,
    train: Any,
    validation: Any,
    *,
    epochs: int | None = None,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    schedule: ScheduleName = "linear",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_gradient_norm: float = 1.0,
    layer_decay: float = 1.0,
    unfreeze: Unfreeze = "all",
    phases: Sequence[Phase | Mapping[str, Any]] | None = None,
    layers: Layers = "by_depth",
    reinitialise: int = 0,
    cache: CacheOption = "auto",
    early_stopping: EarlyStopping | Mapping[str, Any] | None = None,
    evaluations_per_epoch: int = 1,
    length_bucketing: bool = True,
    precision: Precision = "auto",
    teacher: Model | None = None,
    distill: Distillation | Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: Path | None = None,
    cache_folder: Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model` in place and leave it with the weights of its best evaluation.

    train, validation   rows with the task's columns, labels included; or encoded already.
    epochs              3; with phases, their sum.
    phases              [{"train": ["head", "block.5"], "epochs": 1, "learning_rate": 1e-3}, …]: what trains when; what
                        a phase leaves out is as here.
    layers              by_damage: rates, and the order of `unfreeze="gradual"`, follow `model.sensitivity`.
    reinitialise        so many of the highest blocks are drawn anew before the first step.
    cache               whether frozen blocks are run once: auto, off, required, or {"dtype", "bytes", "epochs",
                        "required"} (`prefix_cache.py`).
    cache_folder        where their outputs stay for other trainings too; None: in the workspace, removed at the end.
    early_stopping      {"patience": evaluations without a better metric before training stops}; None: never.
    teacher             a model whose answers are learned too.
    distill             how, such as {"temperature": 2.0, "weight": 0.7}; these without it.
    workspace           where to keep checkpoints; a training interrupted there resumes from its last one and ends in
                        the same bits. None: nothing is kept.
    raises              DataError where there are no rows; RecipeError on phases that can't be; MachineError where a
                        required cache can't be had; ModelError where the model is quantized, the teacher has
                        other labels or another vocabulary, or the loss is no longer finite; Interrupted after
                        Ctrl-C, once a checkpoint is written.
    """
    if model.quantization:
        raise ModelError("finetune: the model is quantized already; fine-tune it before, then quantize.")
    task = TASKS[model.task]
    train, validation = _rows(model, train, "train"), _rows(model, validation, "validation")
    stopping, progress = option(EarlyStopping, early_stopping, "early_stopping"), progress or Progress(quiet=True)
    groups = tuple(layer_groups(model.network))
    names = [group.name for group in groups]
    planned = phases_of(phases, {group.name: len(group.parameters) for group in groups}, unfreeze)
    epochs = epochs_of(epochs, planned)
    steps_per_epoch = -(-len(train) // batch_size)
    steps = epochs * steps_per_epoch
    timetable = timetable_of(
        names,
        planned,
        unfreeze=unfreeze,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        damage=damage_of(model.sensitivity, names) if layers == "by_damage" else None,
    )
    bfloat16 = uses_bfloat16(precision)
    if teacher is not None:
        _check_teacher(model, teacher)
        if isinstance(task, TextClassification):
            train = _with_teacher(train, teacher, task, progress)
    if reinitialise and not (workspace and checkpoints(workspace)):
        draw_blocks(model.network, reinitialise, seed, model.pruned)
    with _folder(workspace) as folder:
        companions = _companions(model)
        still = Still(model.network, names, timetable)
        caching = _caching(
            model,
            train,
            frozen_at(timetable, steps),
            cache_option(cache),
            steps_per_epoch=steps_per_epoch,
            bfloat16=bfloat16,
            folder=cache_folder or folder / "prefix",
            shared=cache_folder is not None,
            obstacle="" if not any(each.alters_forward for each in companions) else "weights are altered on the way",
            progress=progress,
        )
        if caching is not None and caching.plan.runs:
            train = train.add_column("row", list(range(len(train))))
        plan = Plan(
            groups=groups,
            timetable=timetable,
            objective=Objective(task, _teaching(task, teacher, option(Distillation, distill, "distill"))),
            companions=Companions([still, *([caching] if caching else []), *companions]),
            weight_decay=weight_decay,
            evaluate_at=evaluation_steps(steps_per_epoch, epochs, evaluations_per_epoch),
            steps=steps,
            patience=stopping.patience if stopping else None,
            dimensions=model.dimensions,
        )
        trainer = LayerwiseTrainer(
            plan=plan,
            evaluator=lambda: evaluate_loss(model, validation, task),
            sampler=EpochSampler(train["length"], batch_size, seed, length_bucketing),
            network=model.network,
            arguments=_arguments(
                folder,
                epochs=epochs,
                batch_size=batch_size,
                steps=steps,
                max_gradient_norm=max_gradient_norm,
                bfloat16=bfloat16,
                seed=seed,
            ),
            collate=lambda rows: _collate(rows, model, task),
            train=train,
        )
        facts = _train(trainer, folder, task, save_every_seconds, progress)
    training = _training(trainer, task, bfloat16)
    return dataclasses.replace(training, facts=training.facts | facts)


def _caching(
    model: Model,
    train: Any,
    frozen: Sequence[int],
    options: Cache | None,
    *,
    steps_per_epoch: int,
    bfloat16: bool,
    folder: Path,
    shared: bool,
    obstacle: str,
    progress: Progress,
) -> PrefixCache | None:
    """What runs frozen blocks once, or says why it does not; None where nothing stays frozen for long."""
    dimensions = model.dimensions
    rows = cached(lambda: Rows.of(TASKS[model.task], train, model.tokenizer))  # only where something is to be kept
    plan = plan_cache(
        options,
        frozen,
        steps_per_epoch,
        bytes_of=lambda blocks, dtype: states_bytes(rows(), model.network, blocks, dimensions.hidden, dtype),
        bfloat16=bfloat16,
        folder=folder,
        shared=shared,
        obstacle=obstacle,
    )
    if plan.why_not:
        progress.say(f"  frozen blocks run at every step: {plan.why_not}")
    if not (plan.runs or plan.why_not):
        return None
    return PrefixCache(model.network, dimensions, rows(), plan, progress.say)


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


def evaluate_loss(model: Model, encoded: Any, task: Task) -> dict[str, float]:
    """Mean loss and the task's metric on encoded rows, in float32 evaluation mode."""
    found = task.measure(model.network, encoded, model.tokenizer)
    return {name: found[name] for name in ("loss", task.metric)}


def _rows(model: Model, rows: Any, name: str) -> Any:
    ready = encoded(model, rows) if len(rows) else rows
    if len(ready) == 0:  # a language model has no row of a text that is a single token
        raise DataError(f"finetune: {name} holds no rows; give at least one.")
    return ready


def _check_teacher(model: Model, teacher: Model) -> None:
    if teacher.task != model.task:
        raise ModelError(f"finetune: the teacher's task is {teacher.task}, the model's {model.task}. Give one of it.")
    if TASKS[model.task].has_classes and teacher.labels != model.labels:
        raise ModelError(
            f"finetune: the teacher's labels are {', '.join(teacher.labels)}, the model's {', '.join(model.labels)}. "
            "Give a teacher of the same labels in the same order."
        )
    if teacher.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise ModelError(
            "finetune: the teacher's tokenizer has another vocabulary, so it would read other words than the model. "
            "Give a teacher with the same tokenizer."
        )


def _with_teacher(train: Any, teacher: Model, task: TextClassification, progress: Progress) -> Any:
    """The rows with the teacher's logits as a column: one forward pass serves every epoch."""
    progress.say("  asking the teacher")
    logits = task.predict(TorchRuntime(teacher.network), train, teacher.tokenizer)
    return train.add_column("teacher_logits", [row.tolist() for row in logits])


def _teaching(task: Task, teacher: Model | None, options: Distillation | None) -> Teaching | None:
    """What is learned from a teacher; a language model's logits are a vocabulary a token: it is asked at every step."""
    if teacher is None:
        return None
    options = options or Distillation()
    if task.has_classes:
        return Teaching(task, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Teaching(task, options, teacher.network.to(device).eval())


def _companions(model: Model) -> list[Companion]:
    """What goes along; what changes weights last comes last."""
    return [KeptZeros(model.pruned)]


def _collate(rows: Sequence[Mapping[str, Any]], model: Model, task: Task) -> dict[str, torch.Tensor]:
    batch = task.collate(rows, model.tokenizer)
    if "teacher_logits" in rows[0]:
        logits: NDArray[np.float32] = np.array([row["teacher_logits"] for row in rows], dtype=np.float32)
        batch["teacher_logits"] = torch.from_numpy(logits)
    if "row" in rows[0]:
        batch["row"] = torch.tensor([row["row"] for row in rows])
    return batch


@contextmanager
def _folder(workspace: Path | None) -> Iterator[Path]:
    if workspace is not None:
        workspace.mkdir(parents=True, exist_ok=True)
        yield workspace
    else:
        with tempfile.TemporaryDirectory(prefix="moss-") as folder:
            yield Path(folder)


def _arguments(
    folder: Path, *, epochs: int, batch_size: int, steps: int, max_gradient_norm: float, bfloat16: bool, seed: int
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        max_grad_norm=max_gradient_norm,
        bf16=bfloat16,
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="no",
        save_strategy="no",  # the conductor decides
        logging_steps=max(1, steps // _LOGGED_POINTS),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _train(
    trainer: LayerwiseTrainer, folder: Path, task: Task, save_every_seconds: float, progress: Progress
) -> dict[str, Any]:
    """Run to the end or to an interruption; leaves the best weights and returns the companions' facts."""
    shutil.rmtree(folder / "partial", ignore_errors=True)  # a killed run's half-written checkpoint
    last = checkpoints(folder)[-1:]
    set_seed(trainer.args.seed)
    with progress.bar("fine-tuning", trainer.plan.steps) as bar:
        conductor = Conductor(trainer, task, bar, save_every_seconds)
        trainer.add_callback(conductor)
        try:
            with conductor.catching_interrupt():
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        finally:
            for group in trainer.plan.groups:
                group.train(True)
    if conductor.stop_requested.is_set():
        raise Interrupted("stopped at the last step; run again to go on from the checkpoint before")
    trainer.model.cpu()
    load_model(trainer.model, folder / BEST)
    trainer.model.eval()
    return trainer.plan.companions.finish()


def _training(trainer: LayerwiseTrainer, task: Task, bfloat16: bool) -> Training:
    log = trainer.state.log_history
    best = best_of(log, task)
    evaluations = [entry for entry in log if "eval_loss" in entry]
    facts = {
        "steps": trainer.state.global_step,
        "best_step": best.step,
        f"best_validation_{task.metric}": best.metric,
        "stopped_early": trainer.state.global_step < trainer.plan.steps,
        "precision": "bfloat16 autocast" if bfloat16 else "float32",
        "seconds": trainer.seconds,
        "examples_per_second": len(trainer.sampler) * trainer.state.epoch / trainer.seconds,
        "learning_rates": {
            group.name: rate for group, rate in zip(trainer.plan.groups, trainer.plan.timetable.peaks, strict=True)
        },
    }
    history = {
        "train": [_pick(entry, "loss", "learning_rate") for entry in log if "learning_rate" in entry],
        "validation": [
            _pick({key.removeprefix("eval_"): value for key, value in entry.items()}, "loss", task.metric)
            for entry in evaluations
        ],
    }
    return Training(facts, history, float(trainer.state.total_flos))


def _pick(entry: Mapping[str, float], *names: str) -> dict[str, float]:
    return {name: entry[name] for name in ("step", "epoch", *names)}
