"""A model on rows, and two models on the same rows: the numbers of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.evaluation.statistics import bootstrap, paired_difference
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.model.runtime import Runtime, TorchRuntime
from moss_rlhf.tasks import TASKS, Task
from moss_rlhf.tasks.metrics import confusion

if TYPE_CHECKING:
    from moss_rlhf.model.checkpoint import Model


@dataclass(frozen=True)
class Answers:
    """What a runtime answered on rows: logits (rows, classes), class ids (rows,), and the truth (rows,)."""

    logits: NDArray[np.float32]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]

    @property
    def classes(self) -> int:
        return int(self.logits.shape[1])

    @property
    def confidence_in_truth(self) -> NDArray[np.float64]:
        """The probability given to the true class, (rows,)."""
        logits = self.logits.astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        truth: NDArray[np.float64] = exponentials[np.arange(len(self.labels)), self.labels] / exponentials.sum(axis=1)
        return truth


def answer(task: Task, runtime: Runtime, rows: Any, tokenizer: Any) -> Answers:
    """Ask a runtime about encoded rows with labels."""
    logits = task.predict(runtime, rows, tokenizer)
    return Answers(logits, task.answers(logits), np.asarray(rows["labels"], dtype=np.int64))


def metrics_of(task: Task, answers: Answers, *, confidence: float, resamples: int, seed: int) -> dict[str, Any]:
    """Every metric of the task with its interval: {name: {"value", "low", "high"}}."""
    return dict(
        bootstrap(
            answers.labels,
            answers.ids,
            answers.classes,
            metrics=task.metrics,
            confidence=confidence,
            resamples=resamples,
            seed=seed,
        )
    )


def sizes_of(model: Model, mean_length: float) -> dict[str, Any]:
    """Parameters, those that are not zero, and multiply-accumulates a token at the mean length."""
    return {
        "parameters": model.parameters,
        "nonzero": model.nonzero,
        "macs_per_token": macs_per_token(model.dimensions, mean_length),
    }


def gain_of(
    task: Task, before: Answers, after: Answers, *, confidence: float, resamples: int, seed: int
) -> dict[str, Any]:
    """The difference of the task's metric, after − before, on the same rows."""
    difference = paired_difference(
        after.labels,
        before.ids,
        after.ids,
        after.classes,
        metric=task.metrics[task.metric],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    return {"name": task.metric, **difference}


def changed(before: Answers, after: Answers, most: int) -> tuple[list[int], int]:
    """Up to `most` rows whose answer changed, the largest move of confidence in the truth first; and how many did."""
    rows = np.flatnonzero(before.ids != after.ids)
    moved = np.abs(after.confidence_in_truth - before.confidence_in_truth)[rows]
    return [int(row) for row in rows[np.argsort(-moved, kind="stable")][:most]], len(rows)


def confusion_of(answers: Answers) -> list[list[int]]:
    matrix: list[list[int]] = confusion(answers.labels, answers.ids, answers.classes).tolist()
    return matrix


def evaluate(
    model: Model, rows: Any, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """Measure a model in PyTorch on labelled rows: metrics with intervals, rows, sizes.

    rows     encoded rows, or rows with the task's columns.
    """
    from moss_rlhf.tasks.loading import encoded

    task = TASKS[model.task]
    ready = encoded(model, rows)
    answers = answer(task, TorchRuntime(model.network), ready, model.tokenizer)
    metrics = metrics_of(task, answers, confidence=confidence, resamples=resamples, seed=seed)
    return {"metrics": metrics, "rows": len(ready), **sizes_of(model, float(np.mean(ready["length"])))}
