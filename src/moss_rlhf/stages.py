"""From a stage's spec to the method that does it: its type picks the handler, which unpacks it into arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.finetuning import finetune
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import macs_per_token, training_flops
from moss_rlhf.optimization import narrow, prune, quantize, shorten
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import FinetuneSpec, NarrowSpec, PruneSpec, QuantizeSpec, ShortenSpec


@dataclass(frozen=True)
class StageContext:
    """What a stage may use besides its model: encoded rows, a seed, a place to keep its work, the teacher."""

    train: Any
    validation: Any
    seed: int
    work: Path
    teacher: Callable[[str], Model]
    progress: Progress


@dataclass(frozen=True)
class Outcome:
    facts: dict[str, Any]
    flops: float = 0.0
    history: dict[str, Any] | None = field(default=None)


@singledispatch
def apply_stage(spec: object, model: Model, context: StageContext) -> Outcome:
    """Do one stage to `model`, in place."""
    raise TypeError(f"no handler for {type(spec).__name__}")


@apply_stage.register
def _(spec: FinetuneSpec, model: Model, context: StageContext) -> Outcome:
    teacher = context.teacher(spec.distill.teacher) if spec.distill else None
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
        temperature=spec.distill.temperature if spec.distill else 1.0,
        teacher_weight=spec.distill.weight if spec.distill else 0.0,
        seed=context.seed,
        workspace=context.work,
        progress=context.progress,
    )
    asked = _forward_flops(teacher, context.train, len(context.train)) if teacher else 0.0
    return Outcome(training.facts, training.flops + asked, training.history)


@apply_stage.register
def _(spec: NarrowSpec, model: Model, context: StageContext) -> Outcome:
    rows = min(spec.rows, len(context.train))
    flops = _scoring_flops(model, context.train, rows)
    facts = narrow(
        model,
        context.train,
        heads=spec.heads,
        feed_forward=spec.feed_forward,
        rows=spec.rows,
        multiple_of=spec.multiple_of,
        seed=context.seed,
        progress=context.progress,
    )
    return Outcome(facts, flops)


@apply_stage.register
def _(spec: ShortenSpec, model: Model, context: StageContext) -> Outcome:
    rows, depth = min(spec.rows, len(context.train)), len(model.anatomy.blocks)
    passes = sum(depth - count for count in range(spec.remove)) if spec.score == "loss" else 1
    flops = passes * _forward_flops(model, context.train, rows)
    facts = shorten(
        model,
        context.train,
        remove=spec.remove,
        score=spec.score,
        rows=spec.rows,
        seed=context.seed,
        progress=context.progress,
    )
    return Outcome(facts, flops)


@apply_stage.register
def _(spec: PruneSpec, model: Model, context: StageContext) -> Outcome:
    return Outcome(prune(model, sparsity=spec.sparsity))


@apply_stage.register
def _(spec: QuantizeSpec, model: Model, context: StageContext) -> Outcome:
    return Outcome(quantize(model))


def _mean_length(rows: Any) -> float:
    return float(np.mean(rows["length"]))


def _forward_flops(model: Model, rows: Any, count: int) -> float:
    length = _mean_length(rows)
    return 2 * macs_per_token(model.dimensions, length) * length * count


def _scoring_flops(model: Model, rows: Any, count: int) -> float:
    length = _mean_length(rows)
    return training_flops(model.dimensions, length, length * count)
