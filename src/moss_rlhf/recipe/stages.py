"""The stages: what kinds there are, and how each is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Tag
from pydantic_core import PydanticCustomError

from moss_rlhf.errors import nearest
from moss_rlhf.recipe.compression import (
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
)
from moss_rlhf.recipe.ensemble import EnsembleSpec
from moss_rlhf.recipe.finetuning import FinetuneSpec
from moss_rlhf.recipe.pretraining import PretrainSpec
from moss_rlhf.recipe.spec import Spec


class FinetuneStage(Spec):
    finetune: FinetuneSpec


class PretrainStage(Spec):
    pretrain: PretrainSpec


class EnsembleStage(Spec):
    ensemble: EnsembleSpec


class NarrowStage(Spec):
    narrow: NarrowSpec


class ShortenStage(Spec):
    shorten: ShortenSpec


class PruneStage(Spec):
    prune: PruneSpec


class QuantizeStage(Spec):
    quantize: QuantizeSpec


class TrimVocabularyStage(Spec):
    trim_vocabulary: TrimVocabularySpec


class SensitivityStage(Spec):
    sensitivity: SensitivitySpec


STAGE_KINDS: Mapping[str, type[Spec]] = {
    "finetune": FinetuneStage,
    "pretrain": PretrainStage,
    "ensemble": EnsembleStage,
    "narrow": NarrowStage,
    "shorten": ShortenStage,
    "prune": PruneStage,
    "trim_vocabulary": TrimVocabularyStage,
    "quantize": QuantizeStage,
    "sensitivity": SensitivityStage,
}


def _one_kind(value: object) -> object:
    """Refuse what is no stage; `- quantize` and `- quantize:` alone mean the kind with its defaults."""
    if isinstance(value, Spec):
        return value
    fields = {value: None} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or len(fields) != 1:
        raise PydanticCustomError("stage", "a stage is one kind with its fields, such as finetune: {epochs: 3}")
    kind, spec = next(iter(fields.items()))
    if kind not in STAGE_KINDS:
        hint = nearest(str(kind), STAGE_KINDS)
        raise PydanticCustomError("stage", "unknown stage {kind}; {hint}", {"kind": repr(kind), "hint": hint})
    return {kind: {} if spec is None else spec}


def _tag(value: object) -> str:
    return stage_kind(value) if isinstance(value, Spec) else str(next(iter(value)))  # type: ignore[call-overload]  # a mapping


Stage = Annotated[
    Annotated[FinetuneStage, Tag("finetune")]
    | Annotated[PretrainStage, Tag("pretrain")]
    | Annotated[EnsembleStage, Tag("ensemble")]
    | Annotated[NarrowStage, Tag("narrow")]
    | Annotated[ShortenStage, Tag("shorten")]
    | Annotated[PruneStage, Tag("prune")]
    | Annotated[TrimVocabularyStage, Tag("trim_vocabulary")]
    | Annotated[QuantizeStage, Tag("quantize")]
    | Annotated[SensitivityStage, Tag("sensitivity")],
    Discriminator(_tag),
    BeforeValidator(_one_kind),
]


def allow_short_forms(schema: dict[str, Any]) -> None:
    """`- quantize` and `- quantize:` are stages too."""
    kinds = list(STAGE_KINDS)
    empty = {"type": "object", "propertyNames": {"enum": kinds}, "additionalProperties": {"type": "null"}}
    schema["items"] = {"anyOf": [schema["items"], {"enum": kinds}, empty | {"minProperties": 1, "maxProperties": 1}]}


def stage_kind(stage: Spec) -> str:
    """'finetune', 'narrow', … of a stage."""
    return next(kind for kind, stage_class in STAGE_KINDS.items() if isinstance(stage, stage_class))


def stage_spec(stage: Spec) -> Any:
    """The spec inside a stage; its type picks the handler."""
    return getattr(stage, stage_kind(stage))
