"""Models and rows for a task: what needs torch, which the rest of this room does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_rlhf.model.checkpoint import Model, load_checkpoint, load_pretrained
from moss_rlhf.model.config import KEY, read_config
from moss_rlhf.model.locate import locate
from moss_rlhf.tasks import TASKS, TextClassification


def load(path: str | Path, labels: Sequence[str] | None = None, task: str | None = None) -> Model:
    """Load a checkpoint that moss-rlhf wrote, whatever its shapes: `.network`, `.tokenizer`, `.task`.

    path     a directory; with `labels`, also a hub id.
    labels   names in class-id order, to start from a pretrained model whose head is yet to be trained.
    task     with `labels`: the task's name; text classification unless said otherwise.
    raises   ModelError where it is missing or broken.
    """
    place = locate(str(path))
    name = task or read_config(place).get(KEY, {}).get("task", TextClassification.name)
    auto_class = TASKS[name].auto_class()
    return load_checkpoint(place, auto_class) if labels is None else load_pretrained(place, name, auto_class, labels)


def encoded(model: Model, rows: Any, max_length: int | None = None) -> Any:
    """Rows as the methods take them: tokenized, where they are not yet.

    rows     a datasets.Dataset, or a list of mappings, with the task's columns; labels as names or class ids.
    """
    if not isinstance(rows, Sequence) and "input_ids" in rows.column_names:
        return rows
    return TASKS[model.task].encode(_dataset(model, rows), model.tokenizer, max_length or model.max_length)


def _dataset(model: Model, rows: Any) -> Any:
    from datasets import Dataset

    if not isinstance(rows, Sequence):
        return rows
    ids = {name: index for index, name in enumerate(model.labels)}
    return Dataset.from_list(
        [{**row, "label": ids.get(row["label"], row["label"])} if "label" in row else row for row in rows]
    )
