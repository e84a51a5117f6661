"""From a stage's spec to the method that does it: a spec's fields are the method's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.data import read_texts
from moss_rlhf.finetuning import finetune
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.optimization import narrow, prune, quantize, sensitivity, shorten, trim_vocabulary
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
)
from moss_rlhf.tasks import TASKS

METHODS: Mapping[type, Callable[..., dict[str, Any]]] = {
    NarrowSpec: narrow,
    PruneSpec: prune,
    QuantizeSpec: quantize,
    SensitivitySpec: sensitivity,
    ShortenSpec: shorten,
}
"""Each takes (model, training rows, *, the spec's fields, seed, progress) and returns its facts."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its model: encoded rows, a seed, a place to keep its work, the teacher.

    texts       the rows of train and validation before a tokenizer saw them.
    train_rows  the training rows as another tokenizer writes them.
    """

    train: Any
    validation: Any
    seed: int
    work: Path
    teacher: Callable[[str], Model]
    progress: Progress
    texts: Sequence[Any] = ()
    train_rows: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Outcome:
    facts: dict[str, Any]
    flops: float = 0.0
    history: dict[str, Any] | None = field(default=None)


def apply_stage(spec: Any, model: Model, context: StageContext) -> Outcome:
    """Do one stage to `model`, in place."""
    if isinstance(spec, FinetuneSpec):
        return _finetune(spec, model, context)
    if isinstance(spec, TrimVocabularySpec):
        return _trim_vocabulary(spec, model, context)
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    facts = METHODS[type(spec)](model, context.train, **fields, seed=context.seed, progress=context.progress)
    return Outcome(facts, float(facts.pop("flops", 0.0)))


def _trim_vocabulary(spec: TrimVocabularySpec, model: Model, context: StageContext) -> Outcome:
    """By the texts of train and validation; those of test are not looked at, and what they alone use goes."""
    names = [column.name for column in TASKS[model.task].columns if column.kind == "text"]
    texts = [text for rows in context.texts for name in names for text in rows[name]]
    facts = trim_vocabulary(
        model,
        [*texts, *(text for file in spec.corpora for text in read_texts(Path(file)))],
        minimum_count=spec.minimum_count,
        keep=spec.keep,
        characters=spec.characters,
        multiple_of=spec.multiple_of,
        progress=context.progress,
    )
    return Outcome(facts)


def _finetune(spec: FinetuneSpec, model: Model, context: StageContext) -> Outcome:
    teacher = context.teacher(spec.distill.teacher) if spec.distill else None
    taught = context.train_rows(teacher.tokenizer) if teacher and context.train_rows else None
    training = finetune(
        model,
        context.train,
        context.validation,
        epochs=spec.epochs,
        learning_rate=spec.learning_rate,
        batch_size=spec.batch_size,
        schedule=spec.schedule,
        warmup=spec.warmup,
        weight_decay=spec.weight_decay,
        max_gradient_norm=spec.max_gradient_norm,
        layer_decay=spec.layer_decay,
        unfreeze=spec.unfreeze,
        patience=spec.early_stopping.patience if spec.early_stopping else None,
        evaluations_per_epoch=spec.evaluations_per_epoch,
        length_bucketing=spec.length_bucketing,
        precision=spec.precision,
        teacher=teacher,
        teacher_rows=taught,
        temperature=spec.distill.temperature if spec.distill else 1.0,
        teacher_weight=spec.distill.weight if spec.distill else 0.0,
        seed=context.seed,
        workspace=context.work,
        progress=context.progress,
    )
    asked = _forward_flops(teacher, context.train, len(context.train)) if teacher else 0.0
    return Outcome(training.facts, training.flops + asked, training.history)


def _mean_length(rows: Any) -> float:
    return float(np.mean(rows["length"]))


def _forward_flops(model: Model, rows: Any, count: int) -> float:
    length = _mean_length(rows)
    return 2 * macs_per_token(model.dimensions, length) * length * count
