"""How sure a metric is, and whether a difference between two models is more than chance.

A metric of classification depends on the rows only through their confusion matrix, so resampling rows is drawing a
multinomial count for each distinct kind of row: (label, prediction), or (label, before, after) for two models on the
same rows. That is the same distribution as drawing row numbers with replacement, at a cost that does not grow with the
number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from moss_rlhf.tasks.metrics import Classes, Counts, Metric, Numbers, accuracy, class_ids, confusion

_CHUNK_NUMBERS = 2**22  # int64s held at a time: 32 MB for the counts and confusion matrices of one chunk of resamples


class Estimate(TypedDict):
    value: float
    low: float
    high: float


class Difference(TypedDict):
    delta: float
    low: float
    high: float
    p_value: float


def bootstrap(
    labels: Classes,
    predictions: Classes,
    classes: int,
    *,
    metrics: Mapping[str, Metric],
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Measure metrics with their percentile bootstrap intervals (Efron & Tibshirani 1993, §13.3).

    All metrics see the same resamples. The interval has no width where every row is right or every row is wrong: the
    bootstrap cannot see what the sample does not hold.

    labels, predictions  (rows,) class ids in 0 … classes − 1.
    confidence           share of resamples inside the interval, between 0 and 1.
    returns              {name: {"value", "low", "high"}}, in the metric's own unit.
    raises               ValueError as `confusion`, or on confidence or resamples out of range.
    """
    _check(confidence, resamples)
    observed = confusion(labels, predictions, classes)
    cells = np.flatnonzero(observed)
    values: dict[str, list[Numbers]] = {name: [] for name in metrics}
    for counts in _resampled(observed.ravel()[cells], classes, resamples, np.random.default_rng(seed)):
        matrices = _matrices(cells, counts, classes)
        for name, metric in metrics.items():
            values[name].append(metric(matrices))
    return {
        name: Estimate(value=float(metric(observed)), **_interval(values[name], confidence))
        for name, metric in metrics.items()
    }


def paired_difference(
    labels: Classes,
    before: Classes,
    after: Classes,
    classes: int,
    *,
    metric: Metric,
    confidence: float,
    resamples: int,
    seed: int,
) -> Difference:
    """Compare two models on the same rows: metric(after) − metric(before), with its interval and p-value.

    The interval is the paired percentile bootstrap: both models are scored on the same resampled rows. The p-value is
    two-sided, against the hypothesis that swapping the two predictions of any row changes nothing: for `accuracy` exact
    (McNemar's binomial test on the rows where one model is right and the other wrong), else by `resamples` random
    swaps, (k + 1) / (n + 1) (Phipson & Smyth 2010).

    labels, before, after  (rows,) class ids in 0 … classes − 1.
    returns                {"delta", "low", "high", "p_value"}, delta in the metric's own unit.
    raises                 ValueError as `bootstrap`.
    """
    _check(confidence, resamples)
    pairs, counts = _pairs(labels, before, after, classes)
    delta = float(pairs.differences(metric, counts))
    generator = np.random.default_rng(seed)
    draws = [pairs.differences(metric, drawn) for drawn in _resampled(counts, classes, resamples, generator)]
    exact = metric is accuracy
    p_value = _mcnemar(labels, before, after) if exact else _swap_test(pairs, counts, metric, resamples, generator)
    return Difference(delta=delta, **_interval(draws, confidence), p_value=p_value)


@dataclass(frozen=True)
class _Pairs:
    """Kinds of rows by their confusion cell, label · classes + prediction, before and after: (kinds,) each."""

    before: Counts
    after: Counts
    classes: int

    def differences(self, metric: Metric, counts: Counts) -> Numbers:
        """metric(after) − metric(before) for counts of each kind: (..., kinds) → (...)."""
        after = _matrices(self.after, counts, self.classes)
        return metric(after) - metric(_matrices(self.before, counts, self.classes))

    def swappable(self) -> _Pairs:
        """Every kind twice: as it is, then with before and after exchanged."""
        before, after = np.concatenate([self.before, self.after]), np.concatenate([self.after, self.before])
        return _Pairs(before, after, self.classes)


def _pairs(labels: Classes, before: Classes, after: Classes, classes: int) -> tuple[_Pairs, Counts]:
    """The distinct (label, before, after) and how many rows each has: (kinds,) int64."""
    truth, first, second = class_ids(classes, labels=labels, before=before, after=after)
    kinds, counts = np.unique((truth * classes + first) * classes + second, return_counts=True)
    label = kinds // classes**2
    return _Pairs(kinds // classes, label * classes + kinds % classes, classes), counts


def _swap_test(pairs: _Pairs, counts: Counts, metric: Metric, resamples: int, generator: np.random.Generator) -> float:
    """Two-sided p-value: how often swapping each row's predictions by a coin moves the metric as far as observed."""
    observed = abs(float(pairs.differences(metric, counts)))
    both = pairs.swappable()
    extreme = 0
    for size in _chunks(resamples, 2 * counts.size + 2 * pairs.classes**2):
        swapped = generator.binomial(counts, 0.5, size=(size, counts.size))
        moved = both.differences(metric, np.concatenate([counts - swapped, swapped], axis=1))
        extreme += int((np.abs(moved) >= observed - 1e-12).sum())  # equal up to the rounding of the metric
    return (extreme + 1) / (resamples + 1)


def _mcnemar(labels: Classes, before: Classes, after: Classes) -> float:
    """Exact two-sided p-value for accuracy (McNemar 1947): the discordant rows are as coin throws."""
    from scipy.stats import binomtest

    right_before, right_after = np.equal(labels, before), np.equal(labels, after)
    gained, lost = int((right_after & ~right_before).sum()), int((right_before & ~right_after).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _resampled(counts: Counts, classes: int, resamples: int, generator: np.random.Generator) -> Iterator[Counts]:
    """Bootstrap counts of each kind of row, chunk by chunk: (≤ resamples, kinds), each row summing to all rows."""
    rows = counts.sum()
    for size in _chunks(resamples, counts.size + 2 * classes**2):
        yield generator.multinomial(rows, counts / rows, size=size)


def _chunks(resamples: int, numbers_each: int) -> Iterator[int]:
    """Sizes that add up to `resamples`, each small enough for memory."""
    largest = max(1, _CHUNK_NUMBERS // numbers_each)
    for start in range(0, resamples, largest):
        yield min(largest, resamples - start)


def _matrices(cells: Counts, counts: Counts, classes: int) -> Counts:
    """Confusion matrices from counts of kinds: cells (kinds,), counts (..., kinds) → (..., classes, classes)."""
    order = np.argsort(cells, kind="stable")
    distinct, starts = np.unique(cells[order], return_index=True)
    flat = np.zeros((*counts.shape[:-1], classes**2), dtype=np.int64)
    flat[..., distinct] = np.add.reduceat(counts[..., order], starts, axis=-1)
    return flat.reshape(*counts.shape[:-1], classes, classes)


class _Bounds(TypedDict):
    low: float
    high: float


def _interval(draws: Sequence[Numbers], confidence: float) -> _Bounds:
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])
    return _Bounds(low=float(low), high=float(high))


def _check(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}; 0.95 is usual")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 2000 is usual")
