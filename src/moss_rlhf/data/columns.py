"""A task's standard columns: any number of texts, and a label or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Column:
    """A standard column of a task."""

    name: str
    kind: Literal["text", "label"]


def text_names(columns: Sequence[Column]) -> list[str]:
    return [column.name for column in columns if column.kind == "text"]


def label_of(columns: Sequence[Column]) -> str | None:
    """The name of the label's column; None for a task without labels."""
    return next((column.name for column in columns if column.kind == "label"), None)
