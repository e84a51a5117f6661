"""Options of fine-tuning that belong together. In Python each is given as a mapping, or as the object itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from moss_rlhf.errors import RecipeError, nearest

ScheduleName = Literal["linear", "slanted_triangular", "constant"]
Options = TypeVar("Options")


@dataclass(frozen=True)
class EarlyStopping:
    """Stop after `patience` evaluations in a row without a better metric."""

    patience: int = 2


@dataclass(frozen=True)
class Distillation:
    """Learn a teacher's answers: weight · T² · KL + (1 − weight) · the labels' loss (`distillation.py`)."""

    temperature: float = 2.0
    weight: float = 0.7


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
    schedule: ScheduleName | None = None
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
