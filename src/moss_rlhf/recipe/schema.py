"""The recipe's fields: typed, frozen, unknown keys refused.

Nothing here imports torch: a recipe is checked in milliseconds. A spec holds what the user asked for and never enters
an algorithm; the pipeline unpacks it into arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moss_rlhf.errors import nearest


def _as_text(value: object) -> object:
    """Label names and column names are text, whatever YAML read: 1 → '1', true → 'true'."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


OUR_FAULTS = frozenset({"unknown_key", "one_source", "nothing", "stage", "order"})
"""Types of the errors raised here, whose messages are whole sentences already."""

Name = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "number", "boolean"]})]
Removed = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
ColumnReference = int | str | list[int | str]


class Spec(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, value: object) -> object:
        unknown = [key for key in value if key not in cls.model_fields] if isinstance(value, Mapping) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_key",
                "unknown field {names}; {hint}",
                {"names": ", ".join(map(repr, unknown)), "hint": nearest(str(unknown[0]), cls.model_fields)},
            )
        return value


# --- data ----------------------------------------------------------------------------------------------------------


class SplitLayout(Spec):
    """One split with its own layout: where its rows are and how to read them."""

    file: str | None = Field(None, description="path of a csv, tsv, txt, json, jsonl or parquet file, also .gz")
    hub: str | None = Field(None, description="data set id on the hub, or a local directory of one")
    split: str | None = Field(None, description="the split's name in the hub data set; default: this split's own")
    format: Literal["csv", "tsv", "txt", "json", "jsonl", "parquet"] | None = Field(
        None, description="default: from the file's name"
    )
    header: bool | None = Field(None, description="whether the first line names the columns; default: found out")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="default: from the format")
    encoding: str = Field("utf-8", description="of text files, such as utf-8, gb18030, utf-16")
    columns: dict[str, ColumnReference] = Field(
        default_factory=dict, description="the task's columns: a name or a position from 0; a list is joined"
    )
    labels: dict[Name, Name] = Field(default_factory=dict, description="label as it stands in the file: label name")

    @model_validator(mode="after")
    def _one_source(self) -> SplitLayout:
        if (self.file is None) == (self.hub is None):
            raise PydanticCustomError("one_source", "give either 'file' or 'hub', not both and not neither")
        return self


class DataSpec(Spec):
    """Where the rows of each split come from."""

    train: str | SplitLayout
    validation: Annotated[float, Field(gt=0, lt=1)] | str | SplitLayout = Field(
        0.1, description="a file, or the share held out of train (stratified, seeded)"
    )
    test: str | SplitLayout | None = None
    columns: dict[str, ColumnReference] = Field(default_factory=dict, description="for splits without their own")
    labels: dict[Name, Name] = Field(default_factory=dict, description="for splits without their own")
    max_length: Literal["auto"] | Annotated[int, Field(ge=4)] = Field(
        "auto", description="tokens kept of each text; auto: the 99th percentile of train, within the model's limit"
    )
    limit: Positive | dict[Literal["train", "validation", "test"], Positive] | None = Field(
        None, description="a seeded subset of each split"
    )
    broken_lines: Literal["error", "skip"] = Field(
        "error", description="a line with missing cells, an empty text or label, or bytes that can't be decoded"
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_file(cls, value: object) -> object:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value


# --- stages --------------------------------------------------------------------------------------------------------


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
    """Remove whole attention heads and feed-forward neurons: physically smaller matrices."""

    heads: Removed = Field(0.0, description="share removed")
    feed_forward: Removed = Field(0.0, description="share removed")
    score: Literal["fisher"] = "fisher"
    rows: Positive = Field(1024, description="training rows the scores are computed on")
    multiple_of: Positive = Field(8, description="feed-forward widths are kept at multiples of this")

    @model_validator(mode="after")
    def _something(self) -> NarrowSpec:
        if self.heads == 0 and self.feed_forward == 0:
            raise PydanticCustomError("nothing", "removes nothing; give heads or feed_forward a share above 0")
        return self


class ShortenSpec(Spec):
    """Remove whole layers."""

    remove: Positive = 1
    how: Literal["drop"] = "drop"
    score: Literal["loss", "angular"] = Field(
        "loss", description="loss: what removing it costs; angular: how little it turns its input"
    )
    rows: Positive = Field(512, description="training rows the scores are computed on")


class PruneSpec(Spec):
    """Set single weights to zero; they stay zero in later fine-tuning. Makes nothing faster by itself."""

    method: Literal["magnitude"] = "magnitude"
    sparsity: float = Field(gt=0, lt=1)


class QuantizeSpec(Spec):
    """Put the weights on an integer grid, which the export realises exactly."""

    scheme: Literal["int8"] = "int8"


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


StageSpec = FinetuneSpec | NarrowSpec | ShortenSpec | PruneSpec | QuantizeSpec
STAGE_KINDS: Mapping[str, type[Spec]] = {
    "finetune": FinetuneStage,
    "narrow": NarrowStage,
    "shorten": ShortenStage,
    "prune": PruneStage,
    "quantize": QuantizeStage,
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
    | Annotated[QuantizeStage, Tag("quantize")],
    Discriminator(_tag),
    BeforeValidator(_one_kind),
]


def _allow_short_forms(schema: dict[str, Any]) -> None:
    """`- quantize` and `- quantize:` are stages too."""
    kinds = list(STAGE_KINDS)
    empty = {"type": "object", "propertyNames": {"enum": kinds}, "additionalProperties": {"type": "null"}}
    schema["items"] = {"anyOf": [schema["items"], {"enum": kinds}, empty | {"minProperties": 1, "maxProperties": 1}]}


# --- the recipe ----------------------------------------------------------------------------------------------------


class EvaluateSpec(Spec):
    batch_sizes: list[Positive] = Field(default=[1, 8, 32], min_length=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=200, description="of the bootstrap")
    speed_seconds: float = Field(60.0, gt=0, description="how long to measure speed, at least three rounds each")
    speed_rows: Positive = Field(
        256, description="texts that speed is measured on, a batch size; at least four batches"
    )


class Recipe(Spec):
    """Everything that a run does. Two equal recipes on one machine give the same bits."""

    task: Literal["text-classification"]
    model: str = Field(description="hub id or local directory")
    data: DataSpec
    stages: list[Stage] = Field(min_length=1, json_schema_extra=_allow_short_forms)
    evaluate: EvaluateSpec = EvaluateSpec()
    export: list[Literal["onnx"]] = Field(default_factory=list)
    trust_remote_code: bool = Field(
        False, description="run code that the checkpoint brings along; off unless you set it"
    )
    seed: int = Field(0, ge=0, lt=2**32)
    output: str = "runs/run"

    @field_validator("stages")
    @classmethod
    def _order(cls, stages: list[Stage]) -> list[Stage]:
        kinds = [stage_kind(stage) for stage in stages]
        if "quantize" in kinds[:-1]:
            position = kinds.index("quantize")
            raise PydanticCustomError(
                "order",
                "stage {position} is quantize, and {next} follows it; move quantize to the end",
                {"position": position, "next": kinds[position + 1]},
            )
        return stages


def stage_kind(stage: Spec) -> str:
    """'finetune', 'narrow', … of a stage."""
    return next(kind for kind, stage_class in STAGE_KINDS.items() if isinstance(stage, stage_class))


def stage_spec(stage: Spec) -> Any:
    """The spec inside a stage; its type picks the handler."""
    return getattr(stage, stage_kind(stage))


COMPRESSING = frozenset({"narrow", "shorten", "prune", "quantize"})


def stages_before_compression(recipe: Recipe) -> int:
    """How many stages come before the first compressing one: what enters it is 'before', and the teacher 'parent'."""
    kinds = [stage_kind(stage) for stage in recipe.stages]
    return next((index for index, kind in enumerate(kinds) if kind in COMPRESSING), len(kinds))
