"""The fields of `finetune`. `stages.py` of the package hands them to the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Name, Positive, Share, Spec

OptimizerName = Literal["adamw", "adam", "sgd", "adafactor"]
ScheduleName = Literal[
    "constant",
    "linear",
    "cosine",
    "polynomial",
    "inverse_sqrt",
    "slanted_triangular",
    "one_cycle",
    "warmup_stable_decay",
    "reduce_on_plateau",
]
Strength = Annotated[float, Field(ge=0)]
Below = Annotated[float, Field(ge=0, lt=1)]


class EarlyStoppingSpec(Spec):
    patience: Positive = Field(2, description="evaluations without a better metric before training stops")


class DistillSpec(Spec):
    teacher: str = Field("parent", description="'parent' (the model before compression) or a checkpoint directory")
    temperature: float = Field(2.0, gt=0)
    weight: float = Field(0.7, gt=0, le=1, description="share of the teacher's loss; the rest is the labels'")


class LossSpec(Spec):
    """What is asked of the labels."""

    kind: Literal["cross_entropy", "mean_squared_error"] = "cross_entropy"
    label_smoothing: Below = 0.0
    class_weights: Literal["balanced"] | dict[Name, Annotated[float, Field(gt=0)]] | None = Field(
        None, description="balanced: rare classes weigh more; or {label: weight}, other labels weigh 1"
    )
    gamma: Strength = Field(0.0, description="of the focal loss: rows that are known already count less")
    r_drop: Strength = Field(0.0, description="two passes with different dropout are to agree; costs twice as much")

    @model_validator(mode="after")
    def _together(self) -> LossSpec:
        if self.gamma and self.kind != "cross_entropy":
            raise PydanticCustomError("nothing", "gamma is the focal loss's, of kind cross_entropy; leave one out")
        return self


def _owned(spec: Spec, name: str, owners: dict[str, tuple[str, ...]]) -> None:
    """Refuse a constant that the named thing does not have."""
    for field, names in owners.items():
        if getattr(spec, field) is not None and name not in names:
            raise PydanticCustomError(
                "nothing",
                "{field} is for {names}, not {name}; leave it out",
                {"field": field, "names": " and ".join(names), "name": name},
            )


class OptimizerSpec(Spec):
    """An optimizer with its constants."""

    name: OptimizerName = "adamw"
    momentum: Below | None = Field(None, description="sgd; default 0.9")
    betas: tuple[Below, Below] | None = Field(None, description="adamw and adam; default 0.9 and 0.999")
    epsilon: Annotated[float, Field(gt=0)] | None = Field(None, description="adamw and adam; default 1e-8")

    @model_validator(mode="after")
    def _its_own(self) -> OptimizerSpec:
        _owned(self, self.name, {"momentum": ("sgd",), "betas": ("adamw", "adam"), "epsilon": ("adamw", "adam")})
        return self


class ScheduleSpec(Spec):
    """A schedule with its constants."""

    name: ScheduleName = "linear"
    power: Annotated[float, Field(gt=0, lt=100)] | None = Field(None, description="polynomial; default 2")
    decay: Share | None = Field(None, description="warmup_stable_decay: share of the steps that fall; default 0.2")
    factor: Share | None = Field(None, description="reduce_on_plateau: the rate is multiplied by it; default 0.5")
    patience: Positive | None = Field(
        None, description="reduce_on_plateau: evaluations without a better one before it is; default 1"
    )

    @model_validator(mode="after")
    def _its_own(self) -> ScheduleSpec:
        plateau = ("reduce_on_plateau",)
        owners = {"power": ("polynomial",), "decay": ("warmup_stable_decay",), "factor": plateau, "patience": plateau}
        _owned(self, self.name, owners)
        return self


class FinetuneSpec(Spec):
    """Train on the task's labels; the best checkpoint on validation is kept."""

    epochs: Positive = 3
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    batch_size: Positive = 32
    schedule: ScheduleName | ScheduleSpec = Field("linear", description="a name, or a mapping with its constants")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    optimizer: OptimizerName | OptimizerSpec = Field("adamw", description="a name, or a mapping with its constants")
    weight_decay: float = Field(0.01, ge=0, description="decoupled in adamw and adafactor; in adam and sgd coupled")
    l2: Strength = Field(0.0, description="λ/2 Σ w² in the loss")
    l2_start: Strength = Field(0.0, description="λ/2 Σ (w − start)² in the loss, below the head")
    l1: Strength = Field(0.0, description="λ Σ |w|: weights of the blocks become exactly zero, and stay")
    loss: LossSpec | None = Field(None, description="default: the task's own, cross-entropy")
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
