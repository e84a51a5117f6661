"""Fine-tune a model on labelled rows: the driver that turns plain arguments into a `Plan` and runs it."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
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

from moss_rlhf.errors import DataError, Interrupted, MachineError, ModelError, RecipeError, nearest
from moss_rlhf.finetuning.averaging import load_average, steps_to_average
from moss_rlhf.finetuning.companions import Companion, Companions, KeptZeros
from moss_rlhf.finetuning.compiling import Compile, compile_where_it_pays, undo
from moss_rlhf.finetuning.distillation import Teaching
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.objective import Objective
from moss_rlhf.finetuning.options import (
    Averaging,
    Cache,
    CacheOption,
    Distillation,
    EarlyStopping,
    Phase,
    ScheduleName,
    cache_option,
    option,
)
from moss_rlhf.finetuning.packing import check_packing
from moss_rlhf.finetuning.pieces import Pieces
from moss_rlhf.finetuning.planning import Layers, damage_of, epochs_of, phases_of, timetable_of
from moss_rlhf.finetuning.prefix_cache import PrefixCache, Rows, Still, frozen_at, plan_cache, states_bytes
from moss_rlhf.finetuning.sampling import epoch_batches
from moss_rlhf.finetuning.trainer import (
    BEST,
    SAVE_EVERY_SECONDS,
    Conductor,
    LayerwiseTrainer,
    Plan,
    checkpoints,
)
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.processor import fast_bfloat16, processor_flags
from moss_rlhf.model.reinitialise import draw_blocks
from moss_rlhf.model.replay import without_cache
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.progress import Progress
from moss_rlhf.strategy import Judge, Unfreeze
from moss_rlhf.tasks import TASKS, Task, TextClassification, TextGeneration
from moss_rlhf.tasks.loading import encoded
from moss_rlhf.tasks.probabilities import log_mean_probability

_LOGGED_POINTS = 60  # of the loss, for the chart
_TIMED_BATCHES = 5  # where compiling is weighed
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
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
    distill: Distillation | Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: Path | None = None,
    cache_folder: Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model` in place and leave it with the weights of its best evaluation.

    train, validation   rows with the task's columns, labels included; or encoded already.
    batch_tokens        instead of `batch_size` rows, as many as fill this many tokens with padding.
    micro_batch_size    rows that go through the network at once: less memory, the same gradient. A batch that does not
                        fit is cut further by itself.
    packing             of text generation: a batch's documents in one row, none of which sees another: no padding.
    report_to           trackers to send the curves to: tensorboard, mlflow, wandb, trackio.
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
    if packing:
        check_packing(model, train)
    batches = epoch_batches(train["length"], batch_size, seed, bucketing=length_bucketing, tokens=batch_tokens)
    groups = tuple(layer_groups(model.network))
    names = [group.name for group in groups]
    planned = phases_of(phases, {group.name: len(group.parameters) for group in groups}, unfreeze)
    epochs = epochs_of(epochs, planned)
    steps = epochs * len(batches)
    timetable = timetable_of(
        names,
        planned,
        unfreeze=unfreeze,
        steps=steps,
        steps_per_epoch=len(batches),
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        damage=damage_of(model.sensitivity, names) if layers == "by_damage" else None,
    )
    bfloat16 = uses_bfloat16(precision)
    teachers = _teachers(model, teacher)
    if teachers and isinstance(task, TextClassification):
        train = _with_teacher(train, teachers, task, progress)
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
            steps_per_epoch=len(batches),
            bfloat16=bfloat16,
            folder=cache_folder or folder / "prefix",
            shared=cache_folder is not None,
            obstacle=_obstacle(companions, packing, compile),
            progress=progress,
        )
        plan = Plan(
            groups=groups,
            timetable=timetable,
            objective=Objective(task, _teaching(task, teachers, option(Distillation, distill, "distill"))),
            companions=Companions([still, *([caching] if caching else []), *companions]),
            weight_decay=weight_decay,
            evaluate_at=evaluation_steps(len(batches), epochs, evaluations_per_epoch),
            steps=steps,
            judge=judge_of(task, metric),
            patience=stopping.patience if stopping else None,
            average=_averaging(option(Averaging, average, "average")),
            dimensions=model.dimensions,
        )
        trainer = LayerwiseTrainer(
            plan=plan,
            evaluator=lambda: evaluate_loss(model, validation, task),
            batches=batches,
            pieces=Pieces(micro_batch_size),
            progress=progress,
            network=model.network,
            arguments=_arguments(
                folder,
                epochs=epochs,
                batch_size=batch_size,
                steps=steps,
                max_gradient_norm=max_gradient_norm,
                bfloat16=bfloat16,
                checkpointing=gradient_checkpointing,
                report_to=trackers(report_to),
                seed=seed,
            ),
            collate=lambda rows: _collate(rows, model, task, packing),
            train=train.add_column("row", range(len(train))),
        )
        facts = _compiled(trainer, compile, folder)
        facts |= _train(trainer, folder, save_every_seconds, progress)
    training = _training(trainer, bfloat16)
    return dataclasses.replace(training, facts=training.facts | facts)


def _obstacle(companions: Sequence[Companion], packing: bool, compile: Compile) -> str:
    """What speaks against standing in for frozen blocks, if anything."""
    reasons = {
        "weights are altered on the way": any(each.alters_forward for each in companions),
        "packed documents have no place of their own": packing,
        "a compiled network can't be stood in for": compile != "off",
    }
    return "; ".join(reason for reason, holds in reasons.items() if holds)


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


def evaluate_loss(model: Model, encoded: Any, task: Task) -> dict[str, float]:
    """Mean loss and the task's metrics on encoded rows, in float32 evaluation mode."""
    return task.measure(model.network, encoded, model.tokenizer)


def _rows(model: Model, rows: Any, name: str) -> Any:
    ready = encoded(model, rows) if len(rows) else rows
    if len(ready) == 0:  # a language model has no row of a text that is a single token
        raise DataError(f"finetune: {name} holds no rows; give at least one.")
    return ready


def _teachers(model: Model, teacher: Model | Sequence[Model] | None) -> tuple[Model, ...]:
    """Those who teach, each of whom can teach `model`."""
    teachers = (teacher,) if isinstance(teacher, Model) else tuple(teacher or ())
    for each in teachers:
        _check_teacher(model, each)
    if len(teachers) > 1 and not TASKS[model.task].has_classes:
        raise ModelError(f"finetune: {len(teachers)} teachers; a model for {model.task} learns from one. Give one.")
    return teachers


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


def _with_teacher(train: Any, teachers: Sequence[Model], task: TextClassification, progress: Progress) -> Any:
    """The rows with the teacher's logits as a column: one forward pass serves every epoch.

    Of several teachers, the logarithm of their mean probability.
    """
    progress.say("  asking the teacher" + "s" * (len(teachers) > 1))
    every = [task.predict(TorchRuntime(teacher.network), train, teacher.tokenizer) for teacher in teachers]
    logits = every[0] if len(every) == 1 else log_mean_probability(np.stack(every)).astype(np.float32)
    return train.add_column("teacher_logits", [row.tolist() for row in logits])


def _teaching(task: Task, teachers: Sequence[Model], options: Distillation | None) -> Teaching | None:
    """What is learned from a teacher; a language model's logits are a vocabulary a token: it is asked at every step."""
    if not teachers:
        return None
    options = options or Distillation()
    if task.has_classes:
        return Teaching(task, options)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Teaching(task, options, teachers[0].network.to(device).eval())


def _companions(model: Model) -> list[Companion]:
    """What goes along; what changes weights last comes last."""
    return [KeptZeros(model.pruned)]


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


@contextmanager
def _folder(workspace: Path | None) -> Iterator[Path]:
    if workspace is not None:
        workspace.mkdir(parents=True, exist_ok=True)
        yield workspace
    else:
        with tempfile.TemporaryDirectory(prefix="moss-") as folder:
            yield Path(folder)


def _arguments(
    folder: Path,
    *,
    epochs: int,
    batch_size: int,
    steps: int,
    max_gradient_norm: float,
    bfloat16: bool,
    checkpointing: bool,
    report_to: list[str],
    seed: int,
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        max_grad_norm=max_gradient_norm,
        bf16=bfloat16,
        activation_checkpointing=checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="no",
        save_strategy="no",  # the conductor decides
        logging_steps=max(1, steps // _LOGGED_POINTS),
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=report_to,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _compiled(trainer: LayerwiseTrainer, wanted: Compile, folder: Path) -> dict[str, Any]:
    """Compile the network, or leave it, by the time of a few real batches."""

    def step(rows: Sequence[int]) -> None:
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))
        with trainer.compute_loss_context_manager():
            loss = trainer.plan.objective(trainer.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]

    some = list(itertools.islice(trainer.batches, _TIMED_BATCHES))
    trainer.model.train()
    return compile_where_it_pays(trainer.model, wanted, some, step, trainer.plan.steps, folder)


def _train(trainer: LayerwiseTrainer, folder: Path, save_every_seconds: float, progress: Progress) -> dict[str, Any]:
    """Run to the end or to an interruption; leaves the best weights and returns the companions' facts."""
    shutil.rmtree(folder / "partial", ignore_errors=True)  # a killed run's half-written checkpoint
    last = checkpoints(folder)[-1:]
    set_seed(trainer.args.seed)
    with without_cache(trainer.model), progress.bar("fine-tuning", trainer.plan.steps) as bar:
        conductor = Conductor(trainer, bar, save_every_seconds)
        trainer.add_callback(conductor)
        try:
            with conductor.catching_interrupt():
                trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
        finally:
            for group in trainer.plan.groups:
                group.train(True)
            undo(trainer.model)
            if trainer.args.activation_checkpointing:
                trainer.model.activation_checkpointing_disable()
    if conductor.stop_requested.is_set():
        raise Interrupted("stopped at the last step; run again to go on from the checkpoint before")
    trainer.model.cpu()
    load_model(trainer.model, folder / BEST)
    facts = _averaged(trainer, folder) if trainer.plan.average else {}
    trainer.model.eval()
    return facts | trainer.plan.companions.finish()


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


def judge_of(task: Task, metric: str | None) -> Judge:
    """By which of the task's metrics checkpoints are compared.

    raises   RecipeError where the task does not have it.
    """
    known = ["loss", *task.metrics]
    name = metric or task.metric
    if name not in known:
        raise RecipeError(f"finetune.metric: {task.name} has no metric {name!r}; {nearest(name, known)}")
    return Judge(name, name == "loss" or name in task.lower_is_better)


def _averaging(options: Averaging | None) -> Averaging | None:
    if options is not None and (options.last is None) == (options.best is None):
        raise RecipeError("finetune.average: give either last or best, such as {best: 3}.")
    return options


def _training(trainer: LayerwiseTrainer, bfloat16: bool) -> Training:
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
    return Training(facts, history, float(trainer.state.total_flos))


def _pick(entry: Mapping[str, float], *names: str) -> dict[str, float]:
    return {name: entry[name] for name in ("step", "epoch", *names)}
