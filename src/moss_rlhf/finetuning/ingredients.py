"""From the options of a training to its parts: what is asked of labels and teacher, and what goes along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache as cached
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.finetuning.companions import Companion
from moss_rlhf.finetuning.compiling import Compile
from moss_rlhf.finetuning.distillation import LargerTeacher, Teaching
from moss_rlhf.finetuning.imitation import Imitation, Tutor
from moss_rlhf.finetuning.layers import LayerGroup
from moss_rlhf.finetuning.losses import LabelLoss, label_loss
from moss_rlhf.finetuning.movement import MovementPruning
from moss_rlhf.finetuning.options import Cache, Distillation, Loss, Movement, QuantizationAware, Schedule, option
from moss_rlhf.finetuning.prefix_cache import PrefixCache, Rows, plan_cache, states_bytes
from moss_rlhf.finetuning.quantization_aware import Rounding
from moss_rlhf.finetuning.regularisers import Lasso, Ridge, TowardsStart
from moss_rlhf.finetuning.timetable import Timetable
from moss_rlhf.finetuning.trainer import Plateau
from moss_rlhf.model.checkpoint import Model, refuse_no_model
from moss_rlhf.model.device import on_accelerator
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.model.vocabulary import ids_in
from moss_rlhf.progress import Progress
from moss_rlhf.tasks import TASKS, Task, TextClassification
from moss_rlhf.tasks.loading import encoded
from moss_rlhf.tasks.probabilities import log_mean_probability

# --- the teacher ---------------------------------------------------------------------------------------------------


def check_teacher(model: Model, teacher: Model) -> None:
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


def teachers_of(model: Model, teacher: Model | Sequence[Model] | None) -> tuple[Model, ...]:
    """Those who teach, each of whom can teach `model`."""
    given = [] if teacher is None else teacher if isinstance(teacher, list | tuple) else [teacher]
    teachers = tuple(given)
    if teacher is not None and not teachers:
        raise RecipeError("finetune.teacher: is an empty list; give a model, or leave it out.")
    for each in teachers:
        refuse_no_model(each, "finetune.teacher")
        check_teacher(model, each)
    if len(teachers) > 1 and not TASKS[model.task].has_classes:
        raise ModelError(f"finetune: {len(teachers)} teachers; a model for {model.task} learns from one. Give one.")
    return teachers


def ids_of_teacher(model: Model, teacher: Model) -> NDArray[np.int64] | None:
    """The teacher's id of every row of the model's table, (rows,), -1 of one without token; None if they are alike."""
    larger, smaller = teacher.tokenizer.get_vocab(), model.tokenizer.get_vocab()
    if larger == smaller:
        return None
    ids, rows = ids_in(smaller, larger), model.network.get_input_embeddings().num_embeddings
    return np.pad(ids, (0, rows - len(ids)), constant_values=-1)


def read_by(model: Model, teachers: Sequence[Model], train: Any, teacher_rows: Any) -> list[Any]:
    """The training rows as each teacher reads them: as given, else the model's tokens by the teacher's numbers.

    raises   DataError where they are not as many as the model's.
    """
    several = isinstance(teacher_rows, list | tuple) and bool(teacher_rows) and hasattr(teacher_rows[0], "column_names")
    given = list(teacher_rows) if several else [teacher_rows] * len(teachers)
    if len(given) != len(teachers):
        raise DataError(f"finetune: teacher_rows of {len(given)} teachers, and {len(teachers)} teach; give as many.")
    return [
        _renumbered(model, teacher, train) if rows is None else _as_many(encoded(teacher, rows), train)
        for teacher, rows in zip(teachers, given, strict=True)
    ]


def _renumbered(model: Model, teacher: Model, train: Any) -> Any:
    ids = ids_of_teacher(model, teacher)
    return train if ids is None else train.map(lambda row: {"input_ids": ids[row["input_ids"]].tolist()})


def _as_many(rows: Any, train: Any) -> Any:
    if len(rows) != len(train):
        raise DataError(f"finetune: teacher_rows are {len(rows)} rows, train {len(train)}; give the same.")
    return rows


def with_teachers(
    train: Any,
    read: Sequence[Any],
    teachers: Sequence[Model],
    task: TextClassification,
    bfloat16: bool,
    progress: Progress,
) -> Any:
    """The rows with the teacher's logits as a column: one forward pass serves every epoch.

    read       the same rows as each teacher reads them.
    bfloat16   ask in bfloat16, as a teacher is that is asked at every step.
    Of several teachers, the logarithm of their mean probability.
    """
    progress.say("  asking the teacher" + "s" * (len(teachers) > 1))
    every = [_answers(teacher, rows, task, bfloat16) for teacher, rows in zip(teachers, read, strict=True)]
    logits = every[0] if len(every) == 1 else log_mean_probability(np.stack(every)).astype(np.float32)
    return train.add_column("teacher_logits", [row.tolist() for row in logits])


def _answers(teacher: Model, rows: Any, task: TextClassification, bfloat16: bool) -> Any:
    """Logits of every row: of a long text's windows each its own, as each is a row to train on."""
    rows = rows.remove_columns("row") if "row" in rows.column_names else rows
    with on_accelerator(teacher.network):
        device = next(teacher.network.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return task.predict(TorchRuntime(teacher.network), rows, teacher.tokenizer)


def tutor_of(model: Model, teachers: Sequence[Model], options: Distillation) -> Tutor | None:
    """The teacher, if it is asked at every step: a language model's answers are a vocabulary a token, states more.

    raises   ModelError where several would be: their states can't be averaged.
    """
    if not teachers or (TASKS[model.task].has_classes and not options.inside):
        return None
    if len(teachers) > 1:
        raise ModelError("finetune.distill: hidden and attention learn from one teacher. Give one, or leave them out.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network, ids = teachers[0].network.to(device).eval(), ids_of_teacher(model, teachers[0])
    if ids is None:
        return Tutor(network)
    return Tutor(network, LargerTeacher(network, torch.from_numpy(ids).to(device), not TASKS[model.task].has_classes))


def teaching_of(task: Task, teachers: Sequence[Model], tutor: Tutor | None, options: Distillation) -> Teaching | None:
    """What is learned of the teachers' answers."""
    return Teaching(task, options, None if task.has_classes else tutor) if teachers else None


# --- the labels ----------------------------------------------------------------------------------------------------


def labelled_by(model: Model, task: Task, asked: Loss | None, train: Any) -> LabelLoss | None:
    """None: the task's own loss."""
    if asked is None:
        return None
    if asked.r_drop and not _drops_out(model.network):
        raise ModelError(
            "finetune.loss.r_drop: the network has no dropout, so two passes agree already. Leave r_drop out, or set "
            "a dropout in config.json."
        )
    return label_loss(task, asked, *((model.labels, train["labels"]) if task.has_classes else ((), ())))


def _drops_out(network: Any) -> bool:
    """Whether two passes differ: dropout is a module, or a number that a module keeps and calls F.dropout with."""
    modules = [module for module in network.modules() if not isinstance(module, torch.nn.Dropout)]
    numbers = [value for module in modules for name, value in vars(module).items() if "drop" in name]
    dropouts = [module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    return any(isinstance(value, float) and value > 0 for value in (*numbers, *dropouts))


def plateau_of(shape: Schedule) -> Plateau | None:
    if shape.name != "reduce_on_plateau":
        return None
    return Plateau(0.5 if shape.factor is None else shape.factor, shape.patience or 1)


def penalties(model: Model, groups: Sequence[LayerGroup], l2: float, l2_start: float, l1: float) -> Iterator[Companion]:
    for name, strength in {"l2": l2, "l2_start": l2_start, "l1": l1}.items():
        if not 0 <= strength < float("inf"):
            raise RecipeError(f"finetune.{name}: {strength} can't be used; it must be at least 0.")
    if l2:
        yield Ridge(groups, l2)
    if l2_start:
        yield TowardsStart(groups, l2_start)
    if l1:
        yield Lasso(model, groups, l1)


def masks(
    model: Model,
    movement: Movement | Mapping[str, Any] | None,
    rounding: QuantizationAware | Mapping[str, Any] | None,
    timetable: Timetable,
    steps: int,
) -> Iterator[Companion]:
    """What the forward pass sees of the weights: first what is pruned, then what rounding leaves of the rest."""
    if pruned := option(Movement, movement, "movement"):
        pruning = MovementPruning(model, pruned, steps)
        if not all(timetable.trains(pruning.first)):
            raise RecipeError(
                f"finetune.movement.begin: {pruned.begin} of the steps is before all layers train, and scores of "
                "frozen ones say nothing. Give a later begin (with unfreeze gradual at least 0.5)."
            )
        yield pruning
    if rounded := option(QuantizationAware, rounding, "quantization_aware"):
        yield Rounding(model.network, rounded)


# --- frozen blocks -------------------------------------------------------------------------------------------------


def obstacle_to_cache(companions: Sequence[Companion], packing: bool, compile: Compile) -> str:
    """What speaks against standing in for frozen blocks, if anything."""
    reasons = {
        "weights are altered on the way": any(each.alters_forward for each in companions),
        "packed documents have no place of their own": packing,
        "a compiled network can't be stood in for": compile != "off",
        "a teacher is asked for every block": any(isinstance(each, Imitation) for each in companions),
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


def caching_of(
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
