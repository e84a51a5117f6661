"""Fine-tune a model on labelled rows: the driver that turns plain arguments into a `Plan` and runs it."""

from __future__ import annotations

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
from moss_rlhf.finetuning.distillation import LargerTeacher
from moss_rlhf.finetuning.layers import layer_groups, layer_learning_rates
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
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.model.vocabulary import ids_in
from moss_rlhf.model.zeros import Zeros
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
    unfreeze: Literal["all", "gradual"] = "all",
    patience: int | None = None,
    evaluations_per_epoch: int = 1,
    length_bucketing: bool = True,
    precision: Precision = "auto",
    teacher: Model | None = None,
    temperature: float = 2.0,
    teacher_weight: float = 0.7,
    teacher_rows: Any = None,
    seed: int = 0,
    workspace: Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model` in place and leave it with the weights of its best evaluation.

    train, validation   rows with the task's columns, labels included; or encoded already.
    patience            evaluations without a better metric before training stops; None: never.
    teacher             a model whose logits are learned too:
                        teacher_weight · T² KL + (1 - teacher_weight) · labels' loss. Its vocabulary may hold more
                        tokens than the model's, which was cut from it.
    teacher_rows        `train` as the teacher's tokenizer writes it; classification only. None: it reads the model's
                        tokens, by its own numbers.
    workspace           where to keep checkpoints; a training interrupted there resumes from its last one and ends in
                        the same bits. None: nothing is kept.
    raises              DataError where there are no rows; ModelError where the model is quantized, the teacher has
                        other labels or another vocabulary, or the loss is no longer finite; Interrupted after
                        Ctrl-C, once a checkpoint is written.
    """
    if model.quantization:
        raise ModelError("finetune: the model is quantized already; fine-tune it before, then quantize.")
    task = TASKS[model.task]
    train, validation = _rows(model, train, "train"), _rows(model, validation, "validation")
    progress = progress or Progress(quiet=True)
    steps_per_epoch = -(-len(train) // batch_size)
    steps = epochs * steps_per_epoch
    groups = tuple(layer_groups(model.network))
    plan = Plan(
        groups=groups,
        rates=tuple(layer_learning_rates(len(groups) - 2, learning_rate, layer_decay)),
        weight_decay=weight_decay,
        unfreeze=unfreeze,
        schedule=SCHEDULES[schedule],
        warmup=warmup,
        evaluate_at=evaluation_steps(steps_per_epoch, epochs, evaluations_per_epoch),
        steps=steps,
        patience=patience,
        temperature=temperature,
        teacher_weight=teacher_weight,
        dimensions=model.dimensions,
        zeros=Zeros.of(model.pruned),
    )
    bfloat16 = uses_bfloat16(precision)
    if teacher is not None:
        _check_teacher(model, teacher)
        if isinstance(task, TextClassification):
            train = _with_teacher(train, _read_by(teacher, model, train, teacher_rows), teacher, task, progress)
    sampler = EpochSampler(train["length"], batch_size, seed, length_bucketing)
    with _folder(workspace) as folder:
        trainer = LayerwiseTrainer(
            plan=plan,
            task=task,
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
            teacher=_asked_at_every_step(teacher, model),
        )
        _train(trainer, folder, task, save_every_seconds, progress)
    return _training(trainer, task, bfloat16)


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
    if model.tokenizer.get_vocab().keys() - teacher.tokenizer.get_vocab().keys():
        raise ModelError(
            "finetune: the teacher's tokenizer has another vocabulary, so it would read other words than the model. "
            "Give a teacher with the same tokenizer, or one that the model's was cut from."
        )


def _ids_of_teacher(teacher: Model, model: Model) -> NDArray[np.int64] | None:
    """The teacher's id of every row of the model's table, (rows,), -1 of one without token; None if they are alike."""
    larger, smaller = teacher.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    if larger == smaller:
        return None
    ids, rows = ids_in(smaller, larger), model.network.get_input_embeddings().num_embeddings
    return np.pad(ids, (0, rows - len(ids)), constant_values=-1)


def _read_by(teacher: Model, model: Model, train: Any, teacher_rows: Any) -> Any:
    """The training rows as the teacher reads them.

    raises   DataError where they are not as many as the model's.
    """
    if teacher_rows is not None:
        if len(teacher_rows) != len(train):
            raise DataError(f"finetune: teacher_rows are {len(teacher_rows)} rows, train {len(train)}; give the same.")
        return teacher_rows
    ids = _ids_of_teacher(teacher, model)
    return train if ids is None else train.map(lambda row: {"input_ids": ids[row["input_ids"]].tolist()})


def _with_teacher(train: Any, read: Any, teacher: Model, task: TextClassification, progress: Progress) -> Any:
    """The rows with the teacher's logits as a column: one forward pass serves every epoch."""
    progress.say("  asking the teacher")
    logits = task.predict(TorchRuntime(teacher.network), read, teacher.tokenizer)
    return train.add_column("teacher_logits", [row.tolist() for row in logits])


def _asked_at_every_step(teacher: Model | None, model: Model) -> Any:
    """The network of a teacher whose answers can't be kept: a language model's logits are a vocabulary a token."""
    if teacher is None or TASKS[teacher.task].has_classes:
        return None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, ids = teacher.network.to(device).eval(), _ids_of_teacher(teacher, model)
    return network if ids is None else LargerTeacher(network, torch.from_numpy(ids).to(device))


def _collate(rows: Sequence[Mapping[str, Any]], model: Model, task: Task) -> dict[str, torch.Tensor]:
    batch = task.collate(rows, model.tokenizer)
    if "teacher_logits" in rows[0]:
        logits: NDArray[np.float32] = np.array([row["teacher_logits"] for row in rows], dtype=np.float32)
        batch["teacher_logits"] = torch.from_numpy(logits)
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


def _train(trainer: LayerwiseTrainer, folder: Path, task: Task, save_every_seconds: float, progress: Progress) -> None:
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
    trainer.plan.zeros.verify()


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
            group.name: rate for group, rate in zip(trainer.plan.groups, trainer.plan.rates, strict=True)
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
