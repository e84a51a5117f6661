"""Several fine-tunings of one model, combined by probability, and distilled into one that costs what one costs.

The members differ by seed, or by the fold of train that each leaves out (Lakshminarayanan et al. 2017,
arXiv:1612.01474: seeds; Krogh and Vedelsby 1995: folds). Their answer is the mean of their probabilities, which the
incoming model then learns (Hinton et al. 2015, arXiv:1503.02531, §3).
"""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError, RecipeError, nearest
from moss_rlhf.files import keep_curves, read_json, write_json
from moss_rlhf.finetuning.finetune import finetune as fine_tune
from moss_rlhf.finetuning.options import Distillation, option
from moss_rlhf.finetuning.running import Training, training_folder
from moss_rlhf.model.checkpoint import Model, load_checkpoint, save_checkpoint, takes_model
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import FinetuneSpec
from moss_rlhf.recipe.options import check_options
from moss_rlhf.tasks import TASKS, TextClassification
from moss_rlhf.tasks.loading import encoded
from moss_rlhf.tasks.metrics import confusion
from moss_rlhf.tasks.probabilities import brier_score, log_mean_probability, mean_log_loss

By = Literal["seeds", "folds"]
Ids = NDArray[np.int64]
_OURS = ("model", "train", "validation", "teacher", "teacher_rows", "distill", "seed", "workspace", "progress")


@dataclass(frozen=True)
class _Member:
    """One fine-tuning: its seed, the fold that it leaves out (None: nothing), and where it lies when it is done."""

    number: int
    seed: int
    fold: int | None
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def done(self) -> Path:
        return self.folder / "facts.json"


@takes_model
def ensemble(
    model: Model,
    train: Any,
    validation: Any,
    *,
    members: int = 3,
    by: By = "seeds",
    finetune: Mapping[str, Any] | None = None,
    distill: Distillation | Mapping[str, Any] | None = None,
    seed: int = 0,
    workspace: str | Path | None = None,
    progress: Progress | None = None,
) -> Training:
    """Fine-tune `members` copies of a classifier, and teach `model`, in place, the mean of their probabilities.

    train, validation   rows as `finetune` takes them.
    members             how many, 2 or more. Member k has the seed `seed` + k.
    by                  seeds: each learns all of train, judged on validation; folds: member k learns train without
                        fold k, and its best checkpoint is chosen on fold k (stratified, seeded).
    finetune            how each is trained, and the one that learns from them: any argument of `finetune` but teacher,
                        distill, seed, workspace, progress.
    distill             {"temperature": 2.0, "weight": 0.7}, unless given.
    workspace           where members are kept; what is interrupted goes on from there, skips the finished ones and ends
                        in the same bits. None: nothing is kept.
    returns             facts: scores of each member, of all combined and of the one, on validation; with folds, the
                        out-of-fold scores on train. A score is the task's metrics, log_loss (nats) and brier.
    raises              DataError on more folds than examples of a class; RecipeError on an unknown option; ModelError
                        where the task has no classes; and what `finetune` raises.
    """
    task, options, progress = _classifier(model), dict(finetune or {}), progress or Progress(quiet=True)
    _check(members, by, options)
    teaching = option(Distillation, distill, "distill")
    train, validation = (encoded(model, rows, judged=True) for rows in (train, validation))
    folds = stratified_folds(task.labels(train), members, seed, model.labels) if by == "folds" else None
    with training_folder(workspace) as folder:
        options.setdefault("cache_folder", folder / "prefix")  # what is frozen in all of them is run once for all
        every = [
            _Member(number, (seed + number) % 2**32, None if folds is None else number, folder / f"member-{number + 1}")
            for number in range(members)
        ]
        done = []
        for member in every:
            progress.say(f"  member {member.number + 1} of {members}")
            done.append(_trained(member, model, train, validation, folds, options, progress))
        teachers = [load_checkpoint(member.model, task.auto_class()) for member in every]
        facts = _judged(task, teachers, every, train, validation, folds)
        progress.say("  one learns from all")
        one = fine_tune(
            model,
            train,
            validation,
            **options,
            teacher=teachers,
            distill=teaching,
            seed=seed,
            workspace=folder / "one",
            progress=progress,
        )
    facts["one"] = scores(task, log_mean_probability(_logits(task, [model], validation)), validation)
    return _summed(done, facts, one)


def _classifier(model: Model) -> TextClassification:
    task = TASKS[model.task]
    if not isinstance(task, TextClassification):
        raise ModelError(f"ensemble: the task is {model.task}; members are combined for text-classification only.")
    return task


def _check(members: int, by: str, options: Mapping[str, Any]) -> None:
    if members < 2:
        raise RecipeError(f"ensemble.members: {members} is no ensemble. Give 2 or more.")
    if by not in ("seeds", "folds"):
        raise RecipeError(f"ensemble.by: {by!r} can't be used; give seeds or folds.")
    known = [name for name in inspect.signature(fine_tune).parameters if name not in _OURS]
    for name in options:
        if name not in known:
            raise RecipeError(f"ensemble.finetune: {name!r} can't be given here; {nearest(name, known)}")
    check_options(FinetuneSpec, options, "ensemble.finetune")
    if options.get("mixup"):
        raise RecipeError("ensemble.finetune.mixup: mixed rows have no members' answer of their own. Leave it out.")


def stratified_folds(labels: Ids, folds: int, seed: int, names: tuple[str, ...] | None = None) -> Ids:
    """The fold, 0 … folds − 1, of each row; folds and their shares of a class differ by one row at most.

    labels   (rows,) class ids; rows of a class are shuffled by `seed`, then dealt round, class after class.
    names    of the classes, for the error.
    returns  (rows,) int64.
    raises   DataError where a class that occurs has fewer rows than there are folds.
    """
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < folds:
            name = names[label] if names else int(label)
            raise DataError(
                f"ensemble.members: {folds} folds, but train has only {count} of the class {name!r}, and each "
                f"fold needs one. Give {f'at most {count}, or ' * bool(count > 1)}by: seeds."
            )
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    result = np.empty(len(labels), dtype=np.int64)
    result[order] = np.arange(len(labels)) % folds
    return result


def _trained(
    member: _Member,
    model: Model,
    train: Any,
    validation: Any,
    folds: Ids | None,
    options: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Train a member to its end and keep it; or what it left when it was finished before."""
    if member.done.exists():
        done: dict[str, Any] = read_json(member.done)
        return done
    learned, judged = train, validation
    if folds is not None:
        own = folds[_classifier(model).text_of(train)] == member.fold  # all windows of a text are on one side
        learned, judged = (train.select(np.flatnonzero(part)) for part in (~own, own))
    copy = deepcopy(model)
    work = member.folder / "work"
    training = fine_tune(copy, learned, judged, **options, seed=member.seed, workspace=work, progress=progress)
    save_checkpoint(copy, member.model)
    done = {"seed": member.seed, "seconds": training.facts["seconds"], "flops": training.flops}
    write_json(member.done, done)  # last: it says that the model stands
    keep_curves(work, member.folder)
    shutil.rmtree(work)
    return done


def _judged(
    task: TextClassification,
    teachers: list[Model],
    members: list[_Member],
    train: Any,
    validation: Any,
    folds: Ids | None,
) -> dict[str, Any]:
    """Scores of each member and of all together on validation; of folds, on the rows that a member never saw."""
    logits = _logits(task, teachers, validation)
    facts: dict[str, Any] = {
        "members": [scores(task, log_mean_probability(own[None]), validation) for own in logits],
        "combined": scores(task, log_mean_probability(logits), validation),
    }
    if folds is not None:
        facts["out_of_fold"] = scores(task, _unseen(task, teachers, members, train, folds), train)
    return facts


def _logits(task: TextClassification, models: list[Model], rows: Any) -> NDArray[np.float32]:
    """(members, rows, classes)."""
    return np.stack([task.predict(TorchRuntime(model.network), rows, model.tokenizer) for model in models])


def _unseen(
    task: TextClassification, teachers: list[Model], members: list[_Member], train: Any, folds: Ids
) -> NDArray[np.float64]:
    """Log-probabilities (texts, classes) of train, each text's by the member that left it out."""
    result = np.empty((len(folds), len(teachers[0].labels)))
    of_text = task.text_of(train)
    for teacher, member in zip(teachers, members, strict=True):
        own = train.select(np.flatnonzero(folds[of_text] == member.fold))
        result[folds == member.fold] = log_mean_probability(_logits(task, [teacher], own))
    return result


def scores(task: TextClassification, log_probabilities: NDArray[np.float64], rows: Any) -> dict[str, float]:
    """The task's metrics, log loss and Brier score of (texts, classes) log-probabilities, by the texts' labels."""
    labels = task.labels(rows)
    counts = confusion(labels, log_probabilities.argmax(axis=1), log_probabilities.shape[1])
    found = {name: float(metric(counts)) for name, metric in task.metrics.items()}
    return found | {
        "log_loss": mean_log_loss(log_probabilities, labels),
        "brier": brier_score(log_probabilities, labels),
    }


def _summed(done: list[dict[str, Any]], facts: dict[str, Any], one: Training) -> Training:
    """The stage as one training: everybody's seconds and operations, the curve of the one that learned from all."""
    members = [
        {"seed": each["seed"], "seconds": each["seconds"]} | found
        for each, found in zip(done, facts["members"], strict=True)
    ]
    seconds = sum(each["seconds"] for each in done) + one.facts["seconds"]
    training = {name: value for name, value in one.facts.items() if name != "seconds"}
    flops = sum(each["flops"] for each in done) + one.flops
    whole = facts | {"members": members, "learning": training, "seconds": seconds}
    return Training(whole, one.history, flops)
