"""The recipe's `search`: which fields vary, how often, and what decides."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Positive, Spec

_UNTOUCHED = (
    *("data.limit.validation", "data.test", "data.validation"),  # trials are compared on the same rows
    *("evaluate", "export", "model", "output", "search", "seed", "task"),
)


class RangeSpec(Spec):
    """Numbers between two ends; whole ones where both ends are whole."""

    low: float
    high: float
    log: bool = Field(False, description="drawn evenly in the logarithm")
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _rises(self) -> RangeSpec:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise PydanticCustomError("nothing", "a range goes from low up to high, and with log from above 0")
        if self.log and self.step is not None:
            raise PydanticCustomError("nothing", "log and step don't go together; leave one out")
        return self

    @property
    def whole(self) -> bool:
        return self.low.is_integer() and self.high.is_integer() and (self.step or 1.0).is_integer()

    @property
    def ends(self) -> list[float]:
        values = [self.low, self.high]
        return [int(value) for value in values] if self.whole else values


class SearchSpec(Spec):
    """Find the best values of some fields on validation; then train with them. The test split is never looked at."""

    space: dict[str, RangeSpec | Annotated[list[Any], Field(min_length=1)]] = Field(
        min_length=1, description="dotted field: a list of values, or {low, high, log, step}"
    )
    trials: Positive = 20
    rows: Positive | None = Field(None, description="training rows of a trial, a seeded subset; none: all of them")
    metric: str | None = Field(None, description="of validation after the last stage; the task's first, or another")
    seeds: Annotated[int, Field(ge=0)] = Field(
        3, description="trainings of the winner on all rows, for the interval of its metric"
    )
    parallel: Positive = Field(1, description="trials at a time, a process each")
    stop_bad: bool = Field(True, description="end a trial that falls below the median of the finished ones")

    @model_validator(mode="after")
    def _touches_the_method_only(self) -> SearchSpec:
        for field in self.space:
            if field.startswith(_UNTOUCHED):
                raise PydanticCustomError(
                    "nothing",
                    "space: {field} is not to be searched; name fields of stages, or of data but validation and test",
                    {"field": field},
                )
            if self.rows is not None and field.startswith("data.limit"):
                raise PydanticCustomError(
                    "nothing",
                    "space: {field} and rows both say how many rows a trial has; leave one out",
                    {"field": field},
                )
        return self


def candidates(choice: RangeSpec | list[Any]) -> list[Any]:
    """Every value of a list; the ends of a range."""
    return choice.ends if isinstance(choice, RangeSpec) else list(choice)
