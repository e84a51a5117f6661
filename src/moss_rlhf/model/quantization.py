"""What a quantized checkpoint declares: its scheme, and what of it the weights alone don't tell. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from moss_rlhf.errors import ModelError

Scheme = Literal["int8", "int8_static", "int4"]


@dataclass(frozen=True)
class Quantization:
    """A scheme, whose grid the weights lie on.

    group_size   int4: weights of a row that share a scale; None: a scale a row.
    ranges       int8_static: least and most value that enters each matrix, by its weight's name.
    """

    scheme: Scheme
    group_size: int | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.scheme

    def declared(self) -> dict[str, Any]:
        """As config.json says it."""
        values: dict[str, Any] = {"scheme": self.scheme}
        if self.group_size:
            values["group_size"] = self.group_size
        if self.ranges:
            values["ranges"] = {name: list(ends) for name, ends in self.ranges.items()}
        return values

    @classmethod
    def read(cls, declared: Any, place: Path) -> Quantization | None:
        """What config.json says; ModelError where it is no scheme of ours."""
        if not declared:
            return None
        if not isinstance(declared, Mapping) or declared.get("scheme") not in get_args(Scheme):
            raise ModelError(
                f"{place}: config.json declares the quantization {declared!r}; it must name a scheme of "
                f"{', '.join(get_args(Scheme))}. Save the checkpoint again."
            )
        ranges = {name: (float(least), float(most)) for name, (least, most) in declared.get("ranges", {}).items()}
        return cls(declared["scheme"], declared.get("group_size"), ranges)
