"""The fields of `finetune`. `stages.py` of the package hands them to the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.pairs import pair_fault, trains_all_from
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

Layer = Annotated[int, Field(ge=0)]


def allow_none(schema: dict[str, Any]) -> None:
    """`distill: none`, which YAML reads as a text, is null too."""
    schema["anyOf"] = [*schema["anyOf"], {"const": "none"}]


class EarlyStoppingSpec(Spec):
    patience: Positive = Field(2, description="evaluations without a better metric before training stops")


class AverageSpec(Spec):
    """End with the mean of several evaluations' weights, where it is no worse than the best of them."""

    last: Annotated[int, Field(ge=2)] | None = None
    best: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _one(self) -> AverageSpec:
        if (self.last is None) == (self.best is None):
            raise PydanticCustomError("nothing", "give either last or best, such as best: 3")
        return self


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

    @field_validator("schedule")
    @classmethod
    def _of_its_own_steps(cls, value: str | None) -> str | None:
        if value == "reduce_on_plateau":
            raise PydanticCustomError(
                "nothing", "reduce_on_plateau follows the evaluations of all phases; give it to the stage"
            )
        return value


class CacheSpec(Spec):
    """How the outputs of frozen blocks are kept."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the stored states; auto: what training computes in"
    )
    bytes: Positive = Field(16_000_000_000, description="at most so many on disk; above, training goes on without")
    epochs: float = Field(2.0, ge=1, description="the shortest run of epochs that is worth it")
    required: bool = Field(False, description="an error where it can't be had")


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


def _owned(spec: Spec, name: str, owners: Mapping[str, tuple[str, ...]]) -> None:
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


class MovementSpec(Spec):
    """Prune what fine-tuning moves towards zero."""

    sparsity: Share | None = Field(None, description="topv: share of every matrix that is zero at the end")
    mode: Literal["topv", "soft"] = Field("topv", description="soft: the share follows from the regularisation")
    begin: float = Field(0.1, ge=0, lt=1, description="share of the steps after which pruning begins")
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which the target is reached")
    score_learning_rate: float = Field(1e-2, gt=0)
    regularisation: Annotated[float, Field(gt=0)] | None = Field(None, description="soft: drives scores down")
    threshold: Share | None = Field(None, description="soft: a weight stays above it; default 0.1")

    @model_validator(mode="after")
    def _together(self) -> MovementSpec:
        soft = self.mode == "soft"
        if self.begin >= self.end:
            raise PydanticCustomError("nothing", "begin must be below end; give such as begin 0.1 and end 0.7")
        if soft != (self.sparsity is None) or soft != (self.regularisation is not None):
            raise PydanticCustomError("nothing", "give sparsity with mode topv, or regularisation with mode soft")
        if self.threshold is not None and not soft:
            raise PydanticCustomError("nothing", "threshold is for mode soft; leave it out")
        return self


class QuantizationAwareSpec(Spec):
    """Compute with rounded weights while they learn."""

    scheme: Literal["int8", "int4"] = "int8"
    group_size: Positive = Field(128, description="int4: weights of a row that share a scale")
    activations: bool = Field(False, description="int8: round what enters the matrices too")

    @model_validator(mode="after")
    def _together(self) -> QuantizationAwareSpec:
        if self.activations and self.scheme != "int8":
            raise PydanticCustomError("nothing", "activations are rounded by int8 alone; leave them out")
        return self


class FinetuneSpec(Spec):
    """Train on the task's labels; the best checkpoint on validation is kept."""

    epochs: Positive = Field(3, description="with phases: their sum")
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    batch_size: Positive = 32
    schedule: ScheduleName | ScheduleSpec = Field("linear", description="a name, or a mapping with its constants")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    optimizer: OptimizerName | OptimizerSpec = Field("adamw", description="a name, or a mapping with its constants")
    weight_decay: float | None = Field(
        None, ge=0, description="decoupled in adamw and adafactor, default 0.01; in adam and sgd coupled, default 0"
    )
    l2: Strength = Field(0.0, description="λ/2 Σ w² in the loss")
    l2_start: Strength = Field(0.0, description="λ/2 Σ (w − start)² in the loss, below the head")
    l1: Strength = Field(0.0, description="λ Σ |w|: weights of the blocks become exactly zero, and stay")
    movement: MovementSpec | None = Field(None, description="prune while training")
    quantization_aware: QuantizationAwareSpec | None = Field(None, description="round weights while they learn")
    mixup: Strength = Field(0.0, description="α; rows of a batch and their labels are mixed; classification")
    loss: LossSpec | None = Field(None, description="default: the task's own, cross-entropy")
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

    @model_validator(mode="after")
    def _goes_together(self) -> FinetuneSpec:
        teaching = self.distill if isinstance(self.distill, DistillSpec) else None
        fault = pair_fault(
            movement=self.movement,
            quantization_aware=self.quantization_aware,
            l1=self.l1,
            l2_start=self.l2_start,
            reinitialise=self.reinitialise,
            phases=self.phases,
            adapter=self.adapter,
            compile=self.compile != "off",
            mixup=self.mixup,
            loss=self.loss,
            teacher=teaching is not None,
            average=self.average,
            packing=self.packing,
            micro_batch_size=self.micro_batch_size,
            inside=teaching is not None and bool(teaching.hidden or teaching.attention),
        )
        if fault:
            raise PydanticCustomError("nothing", "{fault}", {"fault": fault})
        share = trains_all_from(self.unfreeze, self.phases or ())
        if self.movement and self.movement.begin < share:
            raise PydanticCustomError(
                "nothing",
                "movement begins at {begin} of the steps, and some layers stay frozen until {share}: they can't be "
                "scored. {remedy}",
                {
                    "begin": self.movement.begin,
                    "share": f"{share:.3g}",
                    "remedy": f"give movement a begin of at least {share:.3g}" if share < 1 else "end with train: all",
                },
            )
        return self
