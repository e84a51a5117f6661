"""The stages' fields. A stage's spec names its method's arguments; `stages.py` hands them over as they stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.errors import nearest
from moss_rlhf.recipe.spec import Positive, Removed, Share, Spec

CalibrationRows = Annotated[int, Field(ge=1, description="training rows that the network is measured on")]


class EarlyStoppingSpec(Spec):
    patience: Positive = Field(2, description="evaluations without a better metric before training stops")


class DistillSpec(Spec):
    teacher: str = Field("parent", description="'parent' (the model before compression) or a checkpoint directory")
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.7, gt=0, le=1, description="share of the teacher's loss; the rest is the labels'")


class FinetuneSpec(Spec):
    """Train on the task's labels; the best checkpoint on validation is kept."""

    epochs: Positive = 3
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    batch_size: Positive = 32
    schedule: Literal["linear", "slanted_triangular", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled (AdamW)")
    max_gradient_norm: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate is that of the next above × this")
    unfreeze: Literal["all", "gradual"] = Field("all", description="gradual: from the head down, one group at a time")
    early_stopping: EarlyStoppingSpec | None = None
    evaluations_per_epoch: Positive = 1
    length_bucketing: bool = Field(True, description="batches of similar lengths: less padding")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the processor has it in hardware"
    )
    distill: DistillSpec | None = None


class NarrowSpec(Spec):
    """Remove whole attention heads, feed-forward neurons or hidden features: physically smaller matrices."""

    heads: Removed = Field(0.0, description="share removed from every block")
    feed_forward: Removed = Field(0.0, description="share removed from every block")
    hidden: Removed = Field(0.0, description="share removed of the hidden size; needs fine-tuning afterwards")
    macs: Removed = Field(0.0, description="share of the blocks' multiply-accumulates removed, where it costs least")
    parameters: Removed = Field(0.0, description="share of the blocks' weights removed, where it costs least")
    latency: Removed = Field(0.0, description="share of the blocks' measured time removed, where it costs least")
    score: Literal["fisher", "taylor", "activation", "magnitude"] = "fisher"
    steps: Positive = Field(1, description="cuts; scores are measured anew before each")
    repair: bool = Field(True, description="refit what remains to the uncut outputs, by least squares")
    rows: CalibrationRows = 1024
    multiple_of: Positive = Field(8, description="feed-forward widths are kept at multiples of this")

    @model_validator(mode="after")
    def _something(self) -> NarrowSpec:
        shares = {"heads", "feed_forward", "hidden"}
        budgets = {"macs", "parameters", "latency"}
        given = {name for name in shares | budgets if getattr(self, name)}
        if not given:
            raise PydanticCustomError("nothing", "removes nothing; give heads or feed_forward a share above 0")
        if len(given & budgets) > 1 or (given & budgets and given & {"heads", "feed_forward"}):
            raise PydanticCustomError(
                "nothing",
                "{names} can't be met together; give shares of heads and feed_forward, or one of macs, parameters and "
                "latency",
                {"names": ", ".join(sorted(given - {"hidden"}))},
            )
        return self


class ShortenSpec(Spec):
    """Remove whole layers."""

    remove: Positive = 1
    how: Literal["drop", "merge_average", "merge_collapse", "merge_least_squares", "auto"] = Field(
        "drop", description="auto: drops and merges are measured, and the better is kept"
    )
    score: Literal["loss", "angular", "block_influence"] = Field(
        "loss", description="loss: what removing it costs; the others: how little it changes its input"
    )
    stack: Literal["auto", "encoder", "decoder"] = Field("auto", description="which stack of an encoder-decoder")
    rows: CalibrationRows = 512


class PruneSpec(Spec):
    """Set single weights to zero; they stay zero in later fine-tuning. Makes nothing faster by itself."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    sparsity: Share | None = Field(
        None, description="share of the blocks' weights that become zero; a pattern N:M says it by itself"
    )
    pattern: str = Field("unstructured", description="unstructured; N:M such as 2:4; block such as 4x1")
    scope: Literal["layer", "global"] = Field("layer", description="magnitude: one threshold a matrix, or one for all")
    allocation: Literal["uniform", "outliers", "sensitivity"] = Field(
        "uniform", description="outliers, sensitivity: blocks that need their weights keep more of them"
    )
    rows: CalibrationRows = 128

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"unstructured|[1-9]\d?:[1-9]\d?|[1-9]\d{0,2}x[1-9]\d{0,2}", value):
            raise PydanticCustomError("pattern", "give unstructured, N:M such as 2:4, or a block such as 4x1")
        return value

    @model_validator(mode="after")
    def _one_sparsity(self) -> PruneSpec:
        if (self.sparsity is None) != (":" in self.pattern):
            raise PydanticCustomError(
                "pattern", "give sparsity, such as 0.5, or a pattern N:M, which says it by itself"
            )
        return self


class QuantizeSpec(Spec):
    """Put the weights on an integer grid, which the export realises exactly."""

    scheme: Literal["int8", "int8_static", "int4"] = Field(
        "int8", description="int8: activations at run time; int8_static: their ranges fixed; int4: weights only"
    )
    method: Literal["nearest", "gptq"] = "nearest"
    group_size: Positive = Field(128, description="int4: weights of a row that share a scale")
    activation_order: bool = Field(False, description="gptq: columns of large activations first")
    sparsity: Removed = Field(0.0, description="gptq: prune this share in the same pass (SparseGPT)")
    rows: CalibrationRows = 128


class SensitivitySpec(Spec):
    """Measure what each block and matrix would lose by each method; changes nothing."""

    rows: CalibrationRows = 256


class FinetuneStage(Spec):
    finetune: FinetuneSpec


class NarrowStage(Spec):
    narrow: NarrowSpec


class ShortenStage(Spec):
    shorten: ShortenSpec


class PruneStage(Spec):
    prune: PruneSpec


class QuantizeStage(Spec):
    quantize: QuantizeSpec


class SensitivityStage(Spec):
    sensitivity: SensitivitySpec


STAGE_KINDS: Mapping[str, type[Spec]] = {
    "finetune": FinetuneStage,
    "narrow": NarrowStage,
    "shorten": ShortenStage,
    "prune": PruneStage,
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
    | Annotated[NarrowStage, Tag("narrow")]
    | Annotated[ShortenStage, Tag("shorten")]
    | Annotated[PruneStage, Tag("prune")]
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
