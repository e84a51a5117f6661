"""From a stage's spec to the method that does it: a spec's fields are the method's arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.finetuning import ensemble, finetune
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.optimization import narrow, prune, quantize, sensitivity, shorten
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    EnsembleSpec,
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
)
from moss_rlhf.recipe.spec import Spec

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


def apply_stage(spec: Any, model: Model, context: StageContext) -> Outcome:
    """Do one stage to `model`, in place."""
    if isinstance(spec, FinetuneSpec):
        return _finetune(spec, model, context)
    if isinstance(spec, EnsembleSpec):
        return _ensemble(spec, model, context)
    fields = {name: getattr(spec, name) for name in type(spec).model_fields}
    facts = METHODS[type(spec)](model, context.train, **fields, seed=context.seed, progress=context.progress)
    return Outcome(facts, float(facts.pop("flops", 0.0)))


def _finetune(spec: FinetuneSpec, model: Model, context: StageContext) -> Outcome:
    teacher = context.teacher(spec.distill.teacher) if spec.distill else None
    fields = {name: _plain(getattr(spec, name)) for name in type(spec).model_fields}
    if spec.distill:
        fields["distill"] = {name: value for name, value in fields["distill"].items() if name != "teacher"}
    training = finetune(
        model,
        context.train,
        context.validation,
        **fields,
        teacher=teacher,
        seed=context.seed,
        workspace=context.work,
        progress=context.progress,
    )
    asked = _forward_flops(teacher, context.train, len(context.train)) if teacher else 0.0
    return Outcome(training.facts, training.flops + asked, training.history)


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


def _plain(value: Any) -> Any:
    """A nested spec as the mapping that `finetune` takes for its options; a list of them as a list of those."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return {name: getattr(value, name) for name in type(value).model_fields} if isinstance(value, Spec) else value


def _mean_length(rows: Any) -> float:
    return float(np.mean(rows["length"]))


def _forward_flops(model: Model, rows: Any, count: int) -> float:
    length = _mean_length(rows)
    return 2 * macs_per_token(model.dimensions, length) * length * count
