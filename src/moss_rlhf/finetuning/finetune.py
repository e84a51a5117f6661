"""Fine-tune a model on labelled rows: the driver that turns plain arguments into a `Plan` and runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.files import CURVES
from moss_rlhf.finetuning.adapters import Adapters
from moss_rlhf.finetuning.companions import Companion, Companions, KeptZeros
from moss_rlhf.finetuning.compiling import Compile
from moss_rlhf.finetuning.heap import bound_kernel_caches
from moss_rlhf.finetuning.imitation import Imitation
from moss_rlhf.finetuning.ingredients import (
    caching_of,
    labelled_by,
    masks,
    obstacle_to_cache,
    penalties,
    plateau_of,
    read_by,
    teachers_of,
    teaching_of,
    tutor_of,
    with_teachers,
)
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.mixing import MixedObjective
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.finetuning.options import (
    Adapter,
    Averaging,
    CacheOption,
    Distillation,
    EarlyStopping,
    Loss,
    Movement,
    Optimizer,
    OptimizerName,
    Phase,
    QuantizationAware,
    Schedule,
    cache_option,
    named,
    option,
)
from moss_rlhf.finetuning.packed_documents import check_packing
from moss_rlhf.finetuning.pieces import Pieces
from moss_rlhf.finetuning.planning import Layers, course_of
from moss_rlhf.finetuning.prefix_cache import Still, frozen_at
from moss_rlhf.finetuning.running import (
    Loop,
    Precision,
    Training,
    evaluation_steps,
    judge_of,
    trackers,
    train_network,
    training_folder,
    uses_bfloat16,
)
from moss_rlhf.finetuning.sampling import epoch_batches
from moss_rlhf.finetuning.trainer import SAVE_EVERY_SECONDS, Plan, checkpoints
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.reinitialise import draw_blocks
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import FinetuneSpec
from moss_rlhf.recipe.options import follows
from moss_rlhf.recipe.pairs import pair_fault
from moss_rlhf.strategy import Unfreeze, shaped
from moss_rlhf.tasks import TASKS, Task, TextClassification, TextGeneration
from moss_rlhf.tasks.loading import encoded


@takes_model
@follows(FinetuneSpec, "finetune")
def finetune(
    model: Model,
    train: Any,
    validation: Any,
    *,
    epochs: int | None = None,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    schedule: str | Schedule | Mapping[str, Any] = "linear",
    warmup: float = 0.1,
    optimizer: OptimizerName | Optimizer | Mapping[str, Any] = "adamw",
    weight_decay: float | None = None,
    l2: float = 0.0,
    l2_start: float = 0.0,
    l1: float = 0.0,
    loss: Loss | Mapping[str, Any] | None = None,
    mixup: float = 0.0,
    movement: Movement | Mapping[str, Any] | None = None,
    quantization_aware: QuantizationAware | Mapping[str, Any] | None = None,
    max_gradient_norm: float = 1.0,
    layer_decay: float = 1.0,
    unfreeze: Unfreeze = "all",
    phases: Sequence[Phase | Mapping[str, Any]] | None = None,
    layers: Layers = "by_depth",
    reinitialise: int = 0,
    cache: CacheOption = "auto",
    early_stopping: EarlyStopping | Mapping[str, Any] | None = None,
    evaluations_per_epoch: int = 1,
    metric: str | None = None,
    average: Averaging | Mapping[str, Any] | None = None,
    length_bucketing: bool = True,
    batch_tokens: int | None = None,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    packing: bool = False,
    report_to: Sequence[str] = (),
    compile: Compile = "off",
    precision: Precision = "auto",
    teacher: Model | Sequence[Model] | None = None,
    teacher_rows: Any = None,
    distill: Distillation | Mapping[str, Any] | None = None,
    adapter: Adapter | Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: str | Path | None = None,
    cache_folder: str | Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model` in place and leave it with the weights of its best evaluation.

    train, validation   rows with the task's columns, labels included; or encoded already.
    schedule            a name of `strategy.SCHEDULES`, or with its constants: {"name": "polynomial", "power": 2.0}.
    optimizer           a name, or with its constants: {"name": "sgd", "momentum": 0.9}.
    weight_decay        of matrices and tables, decoupled, 0.01 by default, in adamw and adafactor; in adam and sgd
                        coupled, 0 by default, and of matrices alone.
    l2, l2_start, l1    strengths of the penalties of `regularisers.py`.
    loss                what is asked of the labels, such as {"label_smoothing": 0.1}; None: the task's own loss.
    mixup               of classification: rows of a batch, and their labels, are mixed; α of the Beta distribution.
    movement            prune while training, such as {"sparsity": 0.5}; the zeros are the model's when it is done.
    quantization_aware  compute with rounded weights, such as {"scheme": "int8"}; they lie on the grid when it is done.
    batch_tokens        instead of `batch_size` rows, as many as fill this many tokens with padding.
    micro_batch_size    rows that go through the network at once: less memory, the same gradient. A batch that does not
                        fit is cut further by itself.
    packing             of text generation: a batch's documents in one row, none of which sees another: no padding.
    report_to           trackers to send the curves to: tensorboard, mlflow, wandb, trackio. TensorBoard's files stand
                        in the workspace's folder tensorboard; without one, in runs/ of the working directory.
    compile             torch.compile: off, on, or auto: both ways are timed, and the faster is kept.
    epochs              3; with phases, their sum.
    phases              [{"train": ["head", "block.5"], "epochs": 1, "learning_rate": 1e-3}, …]: what trains when; what
                        a phase leaves out is as here.
    layers              by_damage: rates, and the order of `unfreeze="gradual"`, follow `model.sensitivity`.
    reinitialise        so many of the highest blocks are drawn anew before the first step.
    cache               whether frozen blocks are run once: auto, off, required, or {"dtype", "bytes", "epochs",
                        "required"} (`prefix_cache.py`).
    cache_folder        where their outputs stay for other trainings too; None: in the workspace, removed at the end.
    early_stopping      {"patience": evaluations without a better metric before training stops}; None: never.
    metric              of validation, by which the best weights are chosen and training stops: one of the task's, or
                        loss; None: the task's first.
    average             {"last": n} or {"best": n}: end with the mean of so many evaluations' weights, where validation
                        says that it is no worse than the best of them.
    teacher             a model whose answers are learned too; of several classifiers, the mean of their probabilities.
                        Its vocabulary may hold more tokens than the model's, which was cut from it.
    teacher_rows        `train`, row for row, as the teacher's tokenizer writes it, or a list of these, one a teacher;
                        classification only. None: teachers read the model's tokens, by their own numbers.
    distill             how, such as {"temperature": 2.0, "weight": 0.7, "hidden": 1.0, "attention": 1.0, "layers":
                        "auto"}; temperature and weight as here without it, and nothing of what the teacher does inside.
    adapter             train adapters and the head instead, and merge them at the end, such as {"kind": "lora", "rank":
                        8, "alpha": 16, "dropout": 0.05, "targets": "all-linear", "keep_zeros": False}.
    workspace           where to keep checkpoints; a training interrupted there resumes from its last one and ends in
                        the same bits. None: nothing is kept.
    raises              DataError where there are no rows; RecipeError on values that a recipe could not hold, options
                        that contradict each other, or phases that can't be; MachineError where a
                        required cache can't be had; ModelError where the model is quantized, the teacher has
                        other labels, another vocabulary or layers that can't be paired, or the loss is no longer
                        finite; Interrupted after Ctrl-C, once a checkpoint is written.
    """
    if model.quantization:
        raise ModelError("finetune: the model is quantized already; fine-tune it before, then quantize.")
    taught = option(Distillation, distill, "distill") or Distillation()
    if fault := pair_fault(
        movement=movement,
        quantization_aware=quantization_aware,
        l1=l1,
        l2_start=l2_start,
        reinitialise=reinitialise,
        phases=phases,
        adapter=adapter,
        compile=compile != "off",
        mixup=mixup,
        loss=loss,
        teacher=teacher is not None,
        average=average,
        packing=packing,
        micro_batch_size=micro_batch_size,
        inside=taught.inside,
    ):
        raise RecipeError(f"finetune: {fault}")
    if distill is not None and teacher is None:
        raise RecipeError("finetune.distill: there is no teacher. Give one, such as teacher=load(path).")
    task, progress = TASKS[model.task], progress or Progress(quiet=True)
    workspace, cache_folder = (None if place is None else Path(place) for place in (workspace, cache_folder))
    train, validation = _rows(model, train, "train"), _rows(model, validation, "validation")
    if packing:
        check_packing(model, train)
    batches = epoch_batches(train["length"], batch_size, seed, bucketing=length_bucketing, tokens=batch_tokens)
    groups = tuple(layer_groups(model.network))
    shape = option(Schedule, named(schedule), "schedule") or Schedule()
    course = course_of(
        groups,
        model.sensitivity,
        epochs=epochs,
        steps_per_epoch=len(batches),
        phases=phases,
        unfreeze=unfreeze,
        learning_rate=learning_rate,
        schedule=shaped(shape.name, shape.power, shape.decay),
        warmup=warmup,
        layer_decay=layer_decay,
        layers=layers,
    )
    steps, timetable, bfloat16 = course.steps, course.timetable, uses_bfloat16(precision)
    bound_kernel_caches()
    labelled = labelled_by(model, task, option(Loss, loss, "loss"), train)
    teachers = teachers_of(model, teacher)
    tutor = tutor_of(model, teachers, taught)
    if reinitialise and not (workspace and checkpoints(workspace)):
        draw_blocks(model.network, reinitialise, seed, model.pruned)
    asked = option(Adapter, adapter, "adapter")
    with training_folder(workspace) as folder, _adapted(model, asked, seed) as adapters:
        moving = adapters.groups if adapters else groups
        companions: list[Companion] = [
            *([Imitation(model, tutor, taught, learning_rate, seed)] if tutor and taught.inside else []),
            *([adapters] if adapters else []),
            *penalties(model, moving, l2, l2_start, l1),
            KeptZeros(model.pruned),
            *masks(model, movement, quantization_aware, timetable, steps),
        ]
        if teachers and isinstance(task, TextClassification):
            read = read_by(model, teachers, train, teacher_rows)
            train = with_teachers(train, read, teachers, task, bfloat16, progress)
        caching = caching_of(
            model,
            train,
            frozen_at(timetable, steps),
            cache_option(cache),
            steps_per_epoch=len(batches),
            bfloat16=bfloat16,
            folder=cache_folder or folder / "prefix",
            shared=cache_folder is not None,
            obstacle=obstacle_to_cache(companions, packing, compile),
            progress=progress,
        )
        still = Still(model.network, [group.name for group in groups], timetable)
        method = option(Optimizer, named(optimizer), "optimizer") or Optimizer()
        stopping = option(EarlyStopping, early_stopping, "early_stopping")
        plain = Objective(task, teaching_of(task, teachers, tutor, taught), labelled)
        plan = Plan(
            groups=moving,
            timetable=timetable,
            objective=MixedObjective(model, mixup, seed) if mixup else plain,
            companions=Companions([still, *([caching] if caching else []), *companions]),
            optimizer=method,
            weight_decay=method.decay(weight_decay),
            evaluate_at=evaluation_steps(len(batches), course.epochs, evaluations_per_epoch),
            steps=steps,
            judge=judge_of(task, metric, since=max((each.settled for each in companions), default=0)),
            patience=stopping.patience if stopping else None,
            average=_averaging(option(Averaging, average, "average")),
            dimensions=model.dimensions,
            plateau=plateau_of(shape),
        )
        loop = Loop(
            folder=folder,
            batches=batches,
            epochs=course.epochs,
            batch_size=batch_size,
            max_gradient_norm=max_gradient_norm,
            bfloat16=bfloat16,
            seed=seed,
            save_every_seconds=save_every_seconds,
            progress=progress,
            pieces=Pieces(micro_batch_size),
            checkpointing=gradient_checkpointing,
            compile=compile,
            report_to=trackers(report_to),
            curves=None if workspace is None else workspace / CURVES,
        )
        return train_network(
            model.network,
            plan,
            loop,
            train=_with_positions(train),
            evaluator=lambda: evaluate_loss(model, validation, task),
            collate=lambda rows: _collate(rows, model, task, packing),
        )


def evaluate_loss(model: Model, encoded: Any, task: Task) -> dict[str, float]:
    """Mean loss and the task's metrics on encoded rows, in float32 evaluation mode."""
    return task.measure(model.network, encoded, model.tokenizer)


def _rows(model: Model, rows: Any, name: str) -> Any:
    ready = encoded(model, rows, judged=True) if len(rows) else rows
    if len(ready) == 0:  # a language model has no row of a text that is a single token
        raise DataError(f"finetune: {name} holds no rows; give at least one.")
    return ready


def _averaging(options: Averaging | None) -> Averaging | None:
    if options is None:
        return None
    if (options.last is None) == (options.best is None):
        raise RecipeError("finetune.average: give either last or best, such as {best: 3}.")
    return options


def _with_positions(train: Any) -> Any:
    """The rows with their positions; windows of long texts say in `row` which text they are of, which ends here."""
    own = train.remove_columns("row") if "row" in train.column_names else train
    return own.add_column("row", range(len(own)))


@contextmanager
def _adapted(model: Model, options: Adapter | None, seed: int) -> Iterator[Adapters | None]:
    """The adapters, put in; whatever happens, none stays in the network."""
    adapters = Adapters(model, options, seed) if options else None
    try:
        yield adapters
    finally:
        if adapters:
            adapters.detach()


def _collate(rows: Sequence[Mapping[str, Any]], model: Model, task: Task, packing: bool) -> dict[str, torch.Tensor]:
    if packing and isinstance(task, TextGeneration):
        return task.pack(rows) | _row_positions(rows)
    batch = task.collate(rows, model.tokenizer)
    if "teacher_logits" in rows[0]:
        logits: NDArray[np.float32] = np.array([row["teacher_logits"] for row in rows], dtype=np.float32)
        batch["teacher_logits"] = torch.from_numpy(logits)
    return batch | _row_positions(rows)


def _row_positions(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    return {"row": torch.tensor([row["row"] for row in rows])}
