"""What each row contributes to the metrics, which are functions of the sum: so rows can be drawn again and again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.tasks.metrics import Classes, class_ids

Numbers = NDArray[np.float64]
Whole = NDArray[np.int64]


@dataclass(frozen=True)
class RowStatistics:
    """One array of sufficient statistics a row, its zeros left out.

    A classification's is a one in a cell of the confusion matrix; a language model's is Σ −log p of its target tokens,
    how many there are, and how many of them were the likeliest.

    columns   (rows, entries) int64: which of the flattened array's numbers stand in `values`
    values    (rows, entries) float64
    shape     of the array: (classes, classes), or (3,)
    """

    columns: Whole
    values: Numbers
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.values)

    @property
    def width(self) -> int:
        """Numbers of a row's array."""
        return int(np.prod(self.shape))

    @property
    def keys(self) -> list[NDArray[np.number]]:
        """Columns and values, (rows,) each: rows that agree in all of them are of one kind."""
        return [*self.columns.T, *self.values.T]

    def take(self, rows: Whole) -> RowStatistics:
        """Those of some rows, in the order given."""
        return RowStatistics(self.columns[rows], self.values[rows], self.shape)

    def summed(self, counts: Whole | None = None) -> Numbers:
        """Σ count · row, counts (..., rows), every row once where there are none: (..., *shape)."""
        counts = np.ones(len(self), dtype=np.int64) if counts is None else counts
        sums = np.zeros((*counts.shape[:-1], self.width))
        for columns, values in zip(self.columns.T, self.values.T, strict=True):
            order = np.argsort(columns, kind="stable")
            distinct, starts = np.unique(columns[order], return_index=True)
            sums[..., distinct] += np.add.reduceat(counts[..., order] * values[order], starts, axis=-1)
        return sums.reshape(*counts.shape[:-1], *self.shape)


def confusion_cells(labels: Classes, predictions: Classes, classes: int) -> RowStatistics:
    """Each row's cell of the confusion matrix, whose sum is the matrix. Arguments and errors as of `confusion`."""
    truth, predicted = class_ids(classes, labels=labels, predictions=predictions)
    cells = (truth * classes + predicted)[:, None]
    return RowStatistics(cells, np.ones(cells.shape), (classes, classes))


def written_out(values: Numbers) -> RowStatistics:
    """Statistics (rows, width) without zeros to leave out.

    raises   ValueError where there are no rows.
    """
    if values.ndim != 2 or not values.size:
        raise ValueError(f"values must be (rows, width) with at least one row, got shape {values.shape}")
    columns = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    return RowStatistics(columns, values, (values.shape[1],))


def right_rows(cells: RowStatistics) -> NDArray[np.bool_]:
    """Which rows stand on the diagonal of the confusion matrix, (rows,)."""
    truth, predicted = np.divmod(cells.columns[:, 0], cells.shape[-1])
    right: NDArray[np.bool_] = truth == predicted
    return right
