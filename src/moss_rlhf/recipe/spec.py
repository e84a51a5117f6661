"""What every part of a recipe shares: frozen, typed, unknown keys refused. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.errors import nearest


def _as_text(value: object) -> object:
    """Label names and column names are text, whatever YAML read: 1 → '1', true → 'true'."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int | float) else value


OUR_FAULTS = frozenset({"unknown_key", "one_source", "nothing", "stage", "order", "pattern", "phases", "together"})
"""Types of the errors raised here, whose messages are whole sentences already."""

Name = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "number", "boolean"]})]
Removed = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


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
