"""From a stage's spec to the method that does it: a spec's fields are the method's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.data import read_texts
from moss_rlhf.finetuning import ensemble, finetune, pretrain
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.model.device import on_accelerator
from moss_rlhf.optimization import narrow, prune, quantize, sensitivity, shorten, trim_vocabulary
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    DistillSpec,
    EnsembleSpec,
    FinetuneSpec,
    NarrowSpec,
    PretrainSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
)
from moss_rlhf.recipe.spec import Spec
from moss_rlhf.tasks import TASKS

METHODS: Mapping[type, Callable[..., dict[str, Any]]] = {
    NarrowSpec: narrow,
    PruneSpec: prune,
    QuantizeSpec: quantize,
    SensitivitySpec: sensitivity,
    ShortenSpec: shorten,
}
"""Each takes (model, training rows, *, the spec's fields, seed, progress) and returns its facts."""

ON_ACCELERATOR = (PruneSpec, QuantizeSpec, SensitivitySpec)
"""Those that only measure activations; the others also measure time, and what is shipped runs on the processor."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its model: encoded rows, texts, a seed, a place to work, the teacher.

    train     the rows that a fine-tuning trains on, changed copies included.
    measured  those that the network is measured on, which are as they came.
    texts     the rows of train before a tokenizer saw them; every_text  those of train, its copies and validation.
    train_as  `train`, row for row, as another tokenizer writes it; None where that can't be.
    prefix    where the outputs of frozen blocks stay for other runs; None: in the stage's own place.
    """

    train: Any
    measured: Any
    validation: Any
    texts: Any
    seed: int
    work: Path
    teacher: Callable[[str], Model]
    progress: Progress
    every_text: Sequence[Any] = ()
    train_as: Callable[[Any], Any] | None = None
    prefix: Path | None = None


@dataclass(frozen=True)
class Outcome:
    facts: dict[str, Any]
    flops: float = 0.0
    history: dict[str, Any] | None = field(default=None)


def apply_stage(spec: Any, model: Model, context: StageContext) -> Outcome:
    """Do one stage to `model`, in place."""
    if isinstance(spec, FinetuneSpec):
        return _finetune(spec, model, context)
    if isinstance(spec, PretrainSpec):
        return _pretrain(spec, model, context)
    if isinstance(spec, EnsembleSpec):
        return _ensemble(spec, model, context)
    if isinstance(spec, TrimVocabularySpec):
        return _trim_vocabulary(spec, model, context)
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    with on_accelerator(model.network) if isinstance(spec, ON_ACCELERATOR) else nullcontext():
        facts = METHODS[type(spec)](model, context.measured, **fields, seed=context.seed, progress=context.progress)
    return Outcome(facts, float(facts.pop("flops", 0.0)))


def _trim_vocabulary(spec: TrimVocabularySpec, model: Model, context: StageContext) -> Outcome:
    """By the texts of train, its copies and validation; what test alone uses is not looked at, and goes."""
    texts = [text for rows in context.every_text for text in _task_texts(model, rows)]
    facts = trim_vocabulary(
        model,
        [*texts, *(text for file in spec.corpora for text in read_texts(file))],
        minimum_count=spec.minimum_count,
        keep=spec.keep,
        characters=spec.characters,
        multiple_of=spec.multiple_of,
        progress=context.progress,
    )
    return Outcome(facts)


def _finetune(spec: FinetuneSpec, model: Model, context: StageContext) -> Outcome:
    teacher = context.teacher(spec.distill.teacher) if isinstance(spec.distill, DistillSpec) else None
    fields = {name: _plain(getattr(spec, name)) for name in type(spec).model_fields}
    asked = fields["distill"] if teacher else {}  # not yet settled, auto finds no teacher
    fields["distill"] = {name: value for name, value in asked.items() if name != "teacher"} or None
    training = finetune(
        model,
        context.train,
        context.validation,
        **fields,
        teacher=teacher,
        teacher_rows=_read_by(teacher, model, context) if teacher else None,
        seed=context.seed,
        workspace=context.work,
        cache_folder=context.prefix,
        progress=context.progress,
    )
    taught = _teaching_flops(spec, teacher, context.train, training.facts["steps"]) if teacher else 0.0
    return Outcome(training.facts, training.flops + taught, training.history)


def _read_by(teacher: Model, model: Model, context: StageContext) -> Any:
    """A classifier's training rows as its teacher reads them, where it knows tokens that the model's table has lost."""
    if not TASKS[model.task].has_classes or context.train_as is None:
        return None
    return None if teacher.tokenizer.get_vocab() == model.tokenizer.get_vocab() else context.train_as(teacher.tokenizer)


def _pretrain(spec: PretrainSpec, model: Model, context: StageContext) -> Outcome:
    fields = {name: _plain(getattr(spec, name)) for name in type(spec).model_fields if name != "texts"}
    training = pretrain(
        model,
        _task_texts(model, context.texts) if spec.texts == "task" else spec.texts,
        **fields,
        seed=context.seed,
        workspace=context.work,
        progress=context.progress,
    )
    return Outcome(training.facts, training.flops, training.history)


def _ensemble(spec: EnsembleSpec, model: Model, context: StageContext) -> Outcome:
    asked = spec.members * _forward_flops(model, context.train, len(context.train))
    training = ensemble(
        model,
        context.train,
        context.validation,
        members=spec.members,
        by=spec.by,
        finetune={name: value for name, value in _plain(spec.finetune).items() if name != "distill"},
        distill=_plain(spec.distill),
        seed=context.seed,
        workspace=context.work,
        progress=context.progress,
    )
    return Outcome(training.facts, training.flops + asked, training.history)


def _task_texts(model: Model, rows: Any) -> list[str]:
    """Every text of the rows, uncut: of a pair both."""
    names = [column.name for column in TASKS[model.task].columns if column.kind == "text"]
    return [text for name in names for text in rows[name][:]]


def _teaching_flops(spec: FinetuneSpec, teacher: Model, rows: Any, steps: int) -> float:
    """A classifier's teacher answers every row once; a language model's, and for what it does inside, at every step."""
    classes = TASKS[teacher.task].has_classes
    live = not classes or (
        isinstance(spec.distill, DistillSpec) and bool(spec.distill.hidden or spec.distill.attention)
    )
    count = len(rows) * classes + (steps * spec.batch_size if live else 0)
    return _forward_flops(teacher, rows, count)


def _plain(value: Any) -> Any:
    """A spec, and each one within it, as the mapping that `finetune` takes for its options; lists item by item."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, Spec):
        return value
    return {name: _plain(getattr(value, name)) for name in type(value).model_fields}


def _mean_length(rows: Any) -> float:
    return float(np.mean(rows["length"]))


def _forward_flops(model: Model, rows: Any, count: int) -> float:
    length = _mean_length(rows)
    return 2 * macs_per_token(model.dimensions, length) * length * count
