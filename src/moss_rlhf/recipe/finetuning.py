"""The fields of `finetune`. `stages.py` of the package hands them to the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Positive, Spec

ScheduleName = Literal["linear", "slanted_triangular", "constant"]


class EarlyStoppingSpec(Spec):
    patience: Positive = Field(2, description="evaluations without a better metric before training stops")


class AverageSpec(Spec):
    """End with the mean of several evaluations' weights, where it is no worse than the best of them."""

    last: Annotated[int, Field(ge=2)] | None = None
    best: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _one(self) -> AverageSpec:
        if (self.last is None) == (self.best is None):
            raise PydanticCustomError("nothing", "give either last or best, such as {{best: 3}}")
        return self


class DistillSpec(Spec):
    teacher: str = Field("parent", description="'parent' (the model before compression) or a checkpoint directory")
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.7, gt=0, le=1, description="share of the teacher's loss; the rest is the labels'")


class PhaseSpec(Spec):
    """Epochs in which the same groups train; what it leaves out is as the stage has it."""

    train: Literal["all"] | Annotated[list[str], Field(min_length=1)] = Field(
        "all", description="groups: embeddings, block.0 …, head"
    )
    epochs: Positive = 1
    learning_rate: float | None = Field(None, gt=0, lt=1)
    schedule: ScheduleName | None = Field(None, description="of this phase's steps alone")
    warmup: float | None = Field(None, ge=0, lt=1)
    layer_decay: float | None = Field(None, gt=0, le=1)


class CacheSpec(Spec):
    """How the outputs of frozen blocks are kept."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the stored states; auto: what training computes in"
    )
    bytes: Positive = Field(16_000_000_000, description="at most so many on disk; above, training goes on without")
    epochs: float = Field(2.0, ge=1, description="the shortest run of epochs that is worth it")
    required: bool = Field(False, description="an error where it can't be had")


class FinetuneSpec(Spec):
    """Train on the task's labels; the best checkpoint on validation is kept."""

    epochs: Positive = Field(3, description="with phases: their sum")
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    batch_size: Positive = 32
    schedule: ScheduleName = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled (AdamW)")
    max_gradient_norm: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate is that of the next above × this")
    unfreeze: Literal["all", "gradual", "head_first"] = Field(
        "all", description="gradual: from the head down, one group at a time; head_first: the head alone, then all"
    )
    phases: list[PhaseSpec] | None = Field(None, min_length=1, description="what trains when, instead of unfreeze")
    layers: Literal["by_depth", "by_damage"] = Field(
        "by_depth", description="by_damage: rates and order follow what sensitivity measured"
    )
    reinitialise: int = Field(0, ge=0, description="so many of the highest blocks are drawn anew before the first step")
    cache: Literal["auto", "off", "required"] | CacheSpec = Field(
        "auto", description="run frozen blocks once and keep what they give"
    )
    early_stopping: EarlyStoppingSpec | None = None
    evaluations_per_epoch: Positive = 1
    metric: str | None = Field(
        None, description="of validation, for the best checkpoint and early stopping; the task's first, or loss"
    )
    average: AverageSpec | None = None
    length_bucketing: bool = Field(True, description="batches of similar lengths: less padding")
    batch_tokens: Annotated[int, Field(ge=16)] | None = Field(
        None, description="instead of batch_size rows, as many as fill this many tokens, padding included"
    )
    micro_batch_size: Positive | None = Field(
        None, description="rows that go through the network at once: less memory, the same gradient"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, a third more time")
    packing: bool = Field(False, description="text-generation: a batch's documents in one row, apart from one another")
    report_to: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = Field(
        default_factory=list, description="trackers that the curves are sent to"
    )
    compile: Literal["off", "on", "auto"] = Field(
        "off", description="torch.compile; auto: both ways are timed and the faster is kept"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the processor has it in hardware"
    )
    distill: DistillSpec | None = None

    @model_validator(mode="after")
    def _phases(self) -> FinetuneSpec:
        if self.phases is None:
            return self
        if self.unfreeze != "all":
            raise PydanticCustomError(
                "phases",
                "unfreeze: {unfreeze} and phases both say what trains when; give one of them",
                {"unfreeze": self.unfreeze},
            )
        total = sum(phase.epochs for phase in self.phases)
        if "epochs" in self.model_fields_set and self.epochs != total:
            raise PydanticCustomError(
                "phases",
                "epochs: {epochs}, but the phases have {total} together; leave epochs out",
                {"epochs": self.epochs, "total": total},
            )
        self.__dict__["epochs"] = total  # frozen for everyone else: what the stage has is the sum
        return self

    @model_validator(mode="after")
    def _rates(self) -> FinetuneSpec:
        decays = {self.layer_decay, *(phase.layer_decay for phase in self.phases or ())} - {1.0, None}
        if self.layers == "by_damage" and decays:
            raise PydanticCustomError(
                "phases", "layers: by_damage and layer_decay both set the rates of layers; give one of them"
            )
        return self
