"""Options of fine-tuning that belong together. In Python each is given as a mapping, or as the object itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from moss_rlhf.errors import RecipeError, nearest
from moss_rlhf.strategy import SCHEDULES

Options = TypeVar("Options")


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row without a better metric."""

    patience: int = 2


@dataclass(frozen=True)
class Distillation:
    """Learn a teacher's answers: weight · T² · KL + (1 − weight) · the labels' loss (`distillation.py`).

    hidden, attention   weights of what it does inside (`imitation.py`); 0: nothing is learned of it.
    layers              which layer learns from which (`layer_map.py`).
    relation_heads      that attentions are split into anew; auto: what divides both, up to the teacher's heads.
    """

    temperature: float = 2.0
    weight: float = 0.7
    hidden: float = 0.0
    attention: float = 0.0
    layers: Literal["auto", "uniform", "last"] | Sequence[Sequence[int]] = "auto"
    relation_heads: int | Literal["auto"] = "auto"

    @property
    def inside(self) -> bool:
        """Whether more is learned than answers."""
        return self.hidden > 0 or self.attention > 0


@dataclass(frozen=True)
class Adapter:
    """Train small matrices beside frozen ones (`adapters.py`).

    targets      all-linear: every matrix of the blocks; attention; or names such as query, value.
    keep_zeros   pruned weights are set to zero again after merging; without it pruned matrices are refused.
    """

    kind: Literal["lora", "rslora", "dora"] = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    targets: Literal["all-linear", "attention"] | Sequence[str] = "all-linear"
    keep_zeros: bool = False


@dataclass(frozen=True)
class Averaging:
    """The mean of the `last` evaluations' weights, or of the `best`; one of them is given."""

    last: int | None = None
    best: int | None = None


@dataclass(frozen=True)
class Phase:
    """Epochs in which the same groups train; what is None is as the whole training has it (`planning.py`).

    train   names of groups, or "all".
    """

    train: Literal["all"] | Sequence[str] = "all"
    epochs: int = 1
    learning_rate: float | None = None
    schedule: str | None = None
    warmup: float | None = None
    layer_decay: float | None = None


@dataclass(frozen=True)
class Cache:
    """How the outputs of frozen blocks are kept (`prefix_cache.py`).

    dtype      of the stored states; auto: what training computes in.
    bytes      at most so many on disk; above, training goes on without.
    epochs     the shortest run of epochs with the same frozen blocks that is worth it.
    required   an error where it can't be had, instead of going on without.
    """

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    bytes: int = 16_000_000_000
    epochs: float = 2
    required: bool = False


CacheOption = Literal["auto", "off", "required"] | Cache | Mapping[str, Any]


def cache_option(value: CacheOption) -> Cache | None:
    """The option as written: a word or its fields; None: off."""
    if isinstance(value, str):
        if value not in ("auto", "off", "required"):
            raise RecipeError(f"finetune.cache: {value!r} can't be used; give auto, off, required, or its fields.")
        return None if value == "off" else Cache(required=value == "required")
    found = option(Cache, value, "cache")
    if found and (found.dtype not in ("auto", "float32", "bfloat16", "float16") or min(found.bytes, found.epochs) < 1):
        raise RecipeError(f"finetune.cache: {found} can't be used; see its fields in docs/recipe.md.")
    return found


@dataclass(frozen=True)
class Loss:
    """What is asked of the labels (`losses.py`).

    class_weights   'balanced', or {label: weight}.
    gamma           of the focal loss; 0: the plain one.
    r_drop          how much two passes with different dropout are to agree; 0: one pass.
    """

    kind: Literal["cross_entropy", "mean_squared_error"] = "cross_entropy"
    label_smoothing: float = 0.0
    class_weights: Literal["balanced"] | Mapping[str, float] | None = None
    gamma: float = 0.0
    r_drop: float = 0.0

    def __post_init__(self) -> None:
        _one_of("loss.kind", self.kind, ("cross_entropy", "mean_squared_error"))
        _within("loss.label_smoothing", self.label_smoothing, 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        _within("loss.gamma", self.gamma, self.gamma >= 0, "at least 0")
        _within("loss.r_drop", self.r_drop, self.r_drop >= 0, "at least 0")
        if isinstance(self.class_weights, str):
            _one_of("loss.class_weights", self.class_weights, ("balanced",))
        elif self.class_weights is not None:
            for label, weight in self.class_weights.items():
                _within(f"loss.class_weights.{label}", weight, weight > 0, "above 0")
        if self.gamma and self.kind != "cross_entropy":
            raise RecipeError("finetune.loss: gamma is the focal loss's, of kind cross_entropy. Leave one of them out.")


OptimizerName = Literal["adamw", "adam", "sgd", "adafactor"]


@dataclass(frozen=True)
class Optimizer:
    """Which optimizer, and its constants (`optimizers.py`).

    momentum         of sgd; 0.9 if not given.
    betas, epsilon   of adamw and adam; (0.9, 0.999) and 1e-8 if not given.
    """

    name: OptimizerName = "adamw"
    momentum: float | None = None
    betas: tuple[float, float] | None = None
    epsilon: float | None = None

    @property
    def decouples(self) -> bool:
        """Whether weights decay beside the gradient; else the decay is part of it, and goes through the moments."""
        return self.name in ("adamw", "adafactor")

    def decay(self, asked: float | None) -> float:
        """The weight decay: as asked for, or by default 0.01 where it is decoupled and none where it is not."""
        return (0.01 if self.decouples else 0.0) if asked is None else asked

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, get_args(OptimizerName))
        owners = {"momentum": ("sgd",), "betas": ("adamw", "adam"), "epsilon": ("adamw", "adam")}
        for field, names in owners.items():
            if getattr(self, field) is not None and self.name not in names:
                raise RecipeError(f"finetune.optimizer.{field}: is for {' and '.join(names)}, not {self.name}.")
        for beta in (*(self.betas or ()), *([] if self.momentum is None else [self.momentum])):
            _within("optimizer", beta, 0 <= beta < 1, "at least 0 and below 1 (momentum and betas)")
        if self.epsilon is not None:
            _within("optimizer.epsilon", self.epsilon, self.epsilon > 0, "above 0")


@dataclass(frozen=True)
class Schedule:
    """Which schedule, and its constants (`strategy/schedules.py`).

    power              of polynomial; 2 if not given.
    decay              share of the steps in which warmup_stable_decay falls; 0.2 if not given.
    factor, patience   of reduce_on_plateau: the rate is multiplied by `factor` after `patience` evaluations in a row
                       without a better one; 0.5 and 1 if not given.
    """

    name: str = "linear"
    power: float | None = None
    decay: float | None = None
    factor: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        _one_of("schedule", self.name, tuple(SCHEDULES))
        owners = {"power": "polynomial", "decay": "warmup_stable_decay"}
        owners |= dict.fromkeys(("factor", "patience"), "reduce_on_plateau")
        for field, owner in owners.items():
            if getattr(self, field) is not None and self.name != owner:
                raise RecipeError(f"finetune.schedule.{field}: is for {owner}, not {self.name}. Leave it out.")
        rules = {"power": (0, 100), "decay": (0, 1), "factor": (0, 1), "patience": (0, 10**9)}
        for field, (least, most) in rules.items():
            value = getattr(self, field)
            if value is not None:
                _within(f"schedule.{field}", value, least < value < most, f"above {least} and below {most}")


@dataclass(frozen=True)
class QuantizationAware:
    """Compute with weights rounded to a scheme's grid while they learn (`quantization_aware.py`).

    group_size    int4: weights of a row that share a scale.
    activations   int8: round what enters the matrices too, as the runtime does.
    """

    scheme: Literal["int8", "int4"] = "int8"
    group_size: int = 128
    activations: bool = False

    def __post_init__(self) -> None:
        _one_of("quantization_aware.scheme", self.scheme, ("int8", "int4"))
        _within("quantization_aware.group_size", self.group_size, self.group_size >= 1, "at least 1")
        if self.activations and self.scheme != "int8":
            raise RecipeError("finetune.quantization_aware: activations are rounded by int8 alone. Leave them out.")


@dataclass(frozen=True)
class Movement:
    """Prune what fine-tuning moves towards zero (`movement.py`).

    sparsity         topv: share of every matrix that is zero at the end.
    begin, end       shares of the steps between which it grows.
    regularisation   soft: how strongly scores are driven down.
    threshold        soft: a weight stays while the sigmoid of its score is above it; 0.1 if not given.
    """

    sparsity: float | None = None
    mode: Literal["topv", "soft"] = "topv"
    begin: float = 0.1
    end: float = 0.7
    score_learning_rate: float = 1e-2
    regularisation: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        _one_of("movement.mode", self.mode, ("topv", "soft"))
        if self.sparsity is not None:
            _within("movement.sparsity", self.sparsity, 0 < self.sparsity < 1, "above 0 and below 1")
        _within(
            "movement.begin", self.begin, 0 <= self.begin < self.end <= 1, "at least 0 and below end, end at most 1"
        )
        _within("movement.score_learning_rate", self.score_learning_rate, self.score_learning_rate > 0, "above 0")
        if self.regularisation is not None:
            _within("movement.regularisation", self.regularisation, self.regularisation > 0, "above 0")
        if self.threshold is not None:
            _within("movement.threshold", self.threshold, 0 < self.threshold < 1, "above 0 and below 1")
        self._together()

    def _together(self) -> None:
        soft = self.mode == "soft"
        if soft != (self.sparsity is None) or soft != (self.regularisation is not None):
            raise RecipeError(
                "finetune.movement: give sparsity with mode topv, and regularisation with mode soft, where the share "
                "follows from it."
            )
        if self.threshold is not None and not soft:
            raise RecipeError("finetune.movement.threshold: is for mode soft. Leave it out.")


def _one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RecipeError(f"finetune.{field}: {value!r} is unknown; {nearest(str(value), known)}")


def _within(field: str, value: float, holds: bool, rule: str) -> None:
    if not holds:
        raise RecipeError(f"finetune.{field}: {value!r} can't be used; it must be {rule}.")


def named(value: object) -> Any:
    """A name alone as the mapping that it stands for."""
    return {"name": value} if isinstance(value, str) else value


def option(kind: type[Options], value: Options | Mapping[str, Any] | None, name: str) -> Options | None:
    """`value` as a `kind`; None stays None.

    raises   RecipeError on a field that `kind` does not have.
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise RecipeError(f"finetune.{name}: {value!r} can't be used; it must be a mapping of fields.")
    known = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]  # always a dataclass
    for key in value:
        if key not in known:
            raise RecipeError(f"finetune.{name}: unknown field {key!r}; {nearest(str(key), known)}")
    return kind(**value)
