"""One file a task: its columns, its model class, its features, loss and predictions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from moss_rlhf.tasks.text_classification import TextClassification
from moss_rlhf.tasks.text_generation import TextGeneration
from moss_rlhf.tasks.translation import Translation

Task = TextClassification | TextGeneration | Translation

TASKS: Mapping[str, Task] = {task.name: task for task in (TextClassification(), TextGeneration(), Translation())}

__all__ = ["TASKS", "Task", "TextClassification", "TextGeneration", "Translation"]
