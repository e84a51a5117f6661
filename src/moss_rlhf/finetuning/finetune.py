"""Fine-tune a model on labelled rows: the driver that turns plain arguments into a `Plan` and runs it."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_model
from transformers import TrainingArguments, set_seed

from moss_rlhf.errors import DataError, Interrupted, ModelError
from moss_rlhf.finetuning.adapters import Adapters
from moss_rlhf.finetuning.companions import Companion, Companions, KeptZeros
from moss_rlhf.finetuning.distillation import Teaching
from moss_rlhf.finetuning.imitation import Imitation, Tutor
from moss_rlhf.finetuning.layers import layer_groups, layer_learning_rates
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.finetuning.options import Adapter, Distillation, EarlyStopping, option
from moss_rlhf.finetuning.sampling import EpochSampler
from moss_rlhf.finetuning.timetable import Thaw, Unfreeze
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
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.progress import Progress
from moss_rlhf.strategy import SCHEDULES
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
    epochs: int = 3,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    schedule: Literal["linear", "slanted_triangular", "constant"] = "linear",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_gradient_norm: float = 1.0,
    layer_decay: float = 1.0,
    unfreeze: Unfreeze = "all",
    early_stopping: EarlyStopping | Mapping[str, Any] | None = None,
    evaluations_per_epoch: int = 1,
    length_bucketing: bool = True,
    precision: Precision = "auto",
    teacher: Model | None = None,
    distill: Distillation | Mapping[str, Any] | None = None,
    adapter: Adapter | Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model` in place and leave it with the weights of its best evaluation.

    train, validation   rows with the task's columns, labels included; or encoded already.
    early_stopping      {"patience": evaluations without a better metric before training stops}; None: never.
    teacher             a model whose answers are learned too.
    distill             how, such as {"temperature": 2.0, "weight": 0.7, "hidden": 1.0, "attention": 1.0, "layers":
                        "auto"}; temperature and weight as here without it, and nothing of what the teacher does inside.
    adapter             train adapters and the head instead, and merge them at the end, such as {"kind": "lora", "rank":
                        8, "alpha": 16, "dropout": 0.05, "targets": "all-linear", "keep_zeros": False}.
    workspace           where to keep checkpoints; a training interrupted there resumes from its last one and ends in
                        the same bits. None: nothing is kept.
    raises              DataError where there are no rows; ModelError where the model is quantized, the teacher has
                        other labels, another vocabulary or layers that can't be paired, or the loss is no longer
                        finite; Interrupted after Ctrl-C, once a checkpoint is written.
    """
    if model.quantization:
        raise ModelError("finetune: the model is quantized already; fine-tune it before, then quantize.")
    task = TASKS[model.task]
    train, validation = _rows(model, train, "train"), _rows(model, validation, "validation")
    stopping, progress = option(EarlyStopping, early_stopping, "early_stopping"), progress or Progress(quiet=True)
    steps_per_epoch = -(-len(train) // batch_size)
    steps = epochs * steps_per_epoch
    asked = option(Adapter, adapter, "adapter")
    adapters = Adapters(model, asked, seed) if asked else None
    groups = adapters.groups if adapters else tuple(layer_groups(model.network))
    rates = tuple(layer_learning_rates(len(groups) - 2, learning_rate, layer_decay))
    bfloat16 = uses_bfloat16(precision)
    distillation = option(Distillation, distill, "distill")
    tutor = _tutor(model, teacher, distillation or Distillation())
    if teacher is not None and isinstance(task, TextClassification):
        train = _with_teacher(train, teacher, task, progress)
    plan = Plan(
        groups=groups,
        timetable=Thaw(rates, unfreeze, SCHEDULES[schedule], warmup, steps),
        objective=Objective(task, _teaching(task, teacher, tutor, distillation or Distillation())),
        companions=Companions(_companions(model, tutor, distillation or Distillation(), adapters, learning_rate, seed)),
        weight_decay=weight_decay,
        evaluate_at=evaluation_steps(steps_per_epoch, epochs, evaluations_per_epoch),
        steps=steps,
        patience=stopping.patience if stopping else None,
        dimensions=model.dimensions,
    )
    sampler = EpochSampler(train["length"], batch_size, seed, length_bucketing)
    with _folder(workspace) as folder, _taken_out(adapters):
        trainer = LayerwiseTrainer(
            plan=plan,
            evaluator=lambda: evaluate_loss(model, validation, task),
            sampler=sampler,
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


def _tutor(model: Model, teacher: Model | None, options: Distillation) -> Tutor | None:
    """The teacher, if it is asked at every step: a language model's answers are a vocabulary a token, states more."""
    if teacher is None:
        return None
    _check_teacher(model, teacher)
    if TASKS[model.task].has_classes and not options.inside:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Tutor(teacher.network.to(device).eval())


def _teaching(task: Task, teacher: Model | None, tutor: Tutor | None, options: Distillation) -> Teaching | None:
    """What is learned of a teacher's answers."""
    if teacher is None:
        return None
    return Teaching(task, options, None if task.has_classes else tutor)


def _companions(
    model: Model,
    tutor: Tutor | None,
    options: Distillation,
    adapters: Adapters | None,
    learning_rate: float,
    seed: int,
) -> list[Companion]:
    """What goes along; what changes weights last comes last."""
    inside = [Imitation(model, tutor, options, learning_rate, seed)] if tutor and options.inside else []
    merging = [adapters] if adapters else []
    return [*inside, *merging, KeptZeros(model.pruned)]


def _collate(rows: Sequence[Mapping[str, Any]], model: Model, task: Task) -> dict[str, torch.Tensor]:
    batch = task.collate(rows, model.tokenizer)
    if "teacher_logits" in rows[0]:
        logits: NDArray[np.float32] = np.array([row["teacher_logits"] for row in rows], dtype=np.float32)
        batch["teacher_logits"] = torch.from_numpy(logits)
    return batch


@contextmanager
def _taken_out(adapters: Adapters | None) -> Iterator[None]:
    """Whatever happens, no adapter stays in the network."""
    try:
        yield
    finally:
        if adapters:
            adapters.detach()


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
