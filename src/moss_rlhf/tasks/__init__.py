"""One file a task: its columns, its model class, its features, loss and predictions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moss_rlhf.model.anatomy import family_of
from moss_rlhf.tasks.text_classification import TextClassification
from moss_rlhf.tasks.text_generation import TextGeneration
from moss_rlhf.tasks.translation import Translation

Task = TextClassification | TextGeneration | Translation

TASKS: Mapping[str, Task] = {task.name: task for task in (TextClassification(), TextGeneration(), Translation())}


def usual_task(config: Mapping[str, Any]) -> str:
    """The task of a checkpoint whose config.json names none: that of its family, or of its classification head."""
    if any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or ()):
        return TextClassification.name
    kind = family_of(config["model_type"]).kind
    return next(name for name, task in TASKS.items() if task.families == kind)


__all__ = ["TASKS", "Task", "TextClassification", "TextGeneration", "Translation", "usual_task"]
