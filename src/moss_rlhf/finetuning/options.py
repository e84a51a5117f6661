"""Options of fine-tuning that belong together. In Python each is given as a mapping, or as the object itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moss_rlhf.errors import RecipeError, nearest

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
