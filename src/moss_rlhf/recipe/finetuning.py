"""The fields of `finetune`. `stages.py` of the package hands them to the method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Positive, Spec

Layer = Annotated[int, Field(ge=0)]


def allow_none(schema: dict[str, Any]) -> None:
    """`distill: none`, which YAML reads as a text, is null too."""
    schema["anyOf"] = [*schema["anyOf"], {"const": "none"}]


class EarlyStoppingSpec(Spec):
    patience: Positive = Field(2, description="evaluations without a better metric before training stops")


class DistillSpec(Spec):
    teacher: str = Field("parent", description="'parent' (the model before compression) or a checkpoint directory")
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.7, gt=0, le=1, description="share of the teacher's loss; the rest is the labels'")
    hidden: float = Field(0.0, ge=0, description="weight of the loss of the states that leave the layers")
    attention: float = Field(0.0, ge=0, description="weight of the loss of which tokens attentions relate (MiniLMv2)")
    layers: Literal["auto", "uniform", "last"] | list[tuple[Layer, Layer]] = Field(
        "auto", description="auto: as layers were dropped; last: the last alone; or [[student's, teacher's], …] from 0"
    )
    relation_heads: Literal["auto"] | Positive = Field(
        "auto", description="that attentions are split into anew; auto: what divides both, up to the teacher's heads"
    )

    @field_validator("layers")
    @classmethod
    def _some(cls, value: object) -> object:
        if value == []:
            raise PydanticCustomError("nothing", "pairs no layers; give [[student's, teacher's], …], or auto")
        return value


class AdapterSpec(Spec):
    """Train small matrices beside frozen ones, merged at the end (peft)."""

    kind: Literal["lora", "rslora", "dora"] = "lora"
    rank: Positive = 8
    alpha: float = Field(16.0, gt=0, description="scale: alpha / rank; of rslora alpha / √rank")
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: Literal["all-linear", "attention"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all-linear", description="every matrix of the blocks; those of attention; or names such as query"
    )
    keep_zeros: bool = Field(False, description="set pruned weights to zero again after merging; else refused")


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
    distill: DistillSpec | Literal["auto"] | None = Field(
        "auto",
        description="a teacher; auto: the parent after a compressing stage, where its head was trained; none",
        json_schema_extra=allow_none,
    )

    adapter: AdapterSpec | None = None

    @field_validator("distill", mode="before")
    @classmethod
    def _none_is_no_teacher(cls, value: object) -> object:
        return None if value == "none" else value
