"""One file a task: its columns, its model class, its features, loss and predictions. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from moss_rlhf.tasks.text_classification import TextClassification

Task = TextClassification  # a union, once there are more

TASKS: Mapping[str, Task] = {TextClassification.name: TextClassification()}

__all__ = ["TASKS", "Task", "TextClassification"]
