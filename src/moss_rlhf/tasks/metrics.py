"""Metrics of classification: functions of a confusion matrix, or of a stack of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
Numbers = NDArray[np.float64]
Classes = Sequence[int] | NDArray[np.integer[Any]]
Metric = Callable[[Any], Numbers]
"""Maps the sum of rows' statistics, or a stack of sums, to values (...): of confusion matrices (..., classes, classes),
rows = truth, or of a language model's scores (..., 3)."""


def confusion(labels: Classes, predictions: Classes, classes: int) -> Counts:
    """Count the rows of each (label, prediction).

    labels, predictions  (rows,) class ids in 0 … classes − 1; at least one row.
    returns              (classes, classes) int64, rows = truth, columns = prediction.
    raises               ValueError on no rows, unequal lengths or an id out of range.
    """
    truth, predicted = class_ids(classes, labels=labels, predictions=predictions)
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def accuracy(confusion: Counts) -> Numbers:
    """Share of rows on the diagonal: (..., classes, classes) → (...), 0 to 1."""
    correct: Counts = np.trace(confusion, axis1=-2, axis2=-1)
    share: Numbers = correct / confusion.sum(axis=(-2, -1))
    return share


def macro_f1(confusion: Counts) -> Numbers:
    """Mean over classes of F1 = 2·tp / (2·tp + fp + fn): (..., classes, classes) → (...), 0 to 1.

    A class that is neither in the truth nor predicted has no F1 and is left out of the mean; one that is in either has
    F1 = 0 where nothing of it was right. This is scikit-learn's f1_score(average="macro") without `labels`, or with
    `labels=range(classes), zero_division=nan`.
    """
    correct: Counts = np.diagonal(confusion, axis1=-2, axis2=-1)
    involved: Counts = confusion.sum(axis=-1) + confusion.sum(axis=-2)
    scores = 2 * correct / np.maximum(involved, 1)
    mean: Numbers = scores.sum(axis=-1) / (involved > 0).sum(axis=-1)
    return mean


def class_ids(classes: int, **columns: Classes) -> list[Counts]:
    """The columns as int64 arrays, checked."""
    arrays = [np.asarray(column, dtype=np.int64) for column in columns.values()]
    shapes = {name: array.shape for name, array in zip(columns, arrays, strict=True)}
    if len(set(shapes.values())) != 1 or arrays[0].ndim != 1 or not arrays[0].size:
        raise ValueError(f"{', '.join(columns)} must be equally long lists of at least one row, got shapes {shapes}")
    for name, array in zip(columns, arrays, strict=True):
        if array.min() < 0 or array.max() >= classes:
            raise ValueError(f"{name} must be in 0 … {classes - 1}, got {array.min()} … {array.max()}")
    return arrays
