"""How sure a metric is, and whether a difference between two models is more than chance.

A metric depends on the rows only through the sum of their statistics, so resampling rows is drawing a multinomial
count for each distinct kind of row: a (label, prediction), a (label, before, after) for two models on the same rows,
or each row of its own where no two are alike, as of a language model. That is the same distribution as drawing row
numbers with replacement; for classification its cost does not grow with the number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from moss_rlhf.tasks.metrics import Metric, accuracy
from moss_rlhf.tasks.row_statistics import Numbers, RowStatistics, Whole, right_rows

_CHUNK_NUMBERS = 2**22  # numbers held at a time: 32 MB for the counts and sums of one chunk of resamples


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
    rows: RowStatistics, *, metrics: Mapping[str, Metric], confidence: float, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Measure metrics with their percentile bootstrap intervals (Efron & Tibshirani 1993, §13.3).

    All metrics see the same resamples. The interval has no width where every row is alike, such as all right: the
    bootstrap cannot see what the sample does not hold.

    confidence           share of resamples inside the interval, between 0 and 1.
    returns              {name: {"value", "low", "high"}}, in the metric's own unit.
    raises               ValueError on confidence or resamples out of range.
    """
    _check(confidence, resamples)
    (kinds,), counts = _kinds(rows)
    values: dict[str, list[Numbers]] = {name: [] for name in metrics}
    for drawn in _resampled(counts, kinds.width, resamples, np.random.default_rng(seed)):
        sums = kinds.summed(drawn)
        for name, metric in metrics.items():
            values[name].append(metric(sums))
    observed = kinds.summed(counts)
    return {
        name: Estimate(value=float(metric(observed)), **_interval(values[name], confidence))
        for name, metric in metrics.items()
    }


def paired_difference(
    before: RowStatistics, after: RowStatistics, *, metric: Metric, confidence: float, resamples: int, seed: int
) -> Difference:
    """Compare two models on the same rows: metric(after) − metric(before), with its interval and p-value.

    The interval is the paired percentile bootstrap: both models are scored on the same resampled rows. The p-value is
    two-sided, against the hypothesis that swapping the two answers to any row changes nothing: for `accuracy` exact
    (McNemar's binomial test on the rows where one model is right and the other wrong), else by `resamples` random
    swaps, (k + 1) / (n + 1) (Phipson & Smyth 2010).

    before, after          of the same rows in the same order.
    returns                {"delta", "low", "high", "p_value"}, delta in the metric's own unit.
    raises                 ValueError as `bootstrap`, or where the rows are not equally many and of one shape.
    """
    _check(confidence, resamples)
    if len(before) != len(after) or before.shape != after.shape:
        raise ValueError(
            f"before and after must be of the same rows, got {len(before)} rows of shape {before.shape} and "
            f"{len(after)} of shape {after.shape}"
        )
    (first, second), counts = _kinds(before, after)
    pairs = _Pairs(first, second)
    delta = float(pairs.differences(metric, counts))
    generator = np.random.default_rng(seed)
    draws = [pairs.differences(metric, drawn) for drawn in _resampled(counts, pairs.width, resamples, generator)]
    exact = metric is accuracy
    p_value = _mcnemar(before, after) if exact else _swap_test(pairs, counts, metric, resamples, generator)
    return Difference(delta=delta, **_interval(draws, confidence), p_value=p_value)


@dataclass(frozen=True)
class _Pairs:
    """Kinds of rows, before and after."""

    before: RowStatistics
    after: RowStatistics

    @property
    def width(self) -> int:
        return self.before.width

    def differences(self, metric: Metric, counts: Whole) -> Numbers:
        """metric(after) − metric(before) for counts of each kind: (..., kinds) → (...)."""
        return metric(self.after.summed(counts)) - metric(self.before.summed(counts))

    def swappable(self) -> _Pairs:
        """Every kind twice: as it is, then with before and after exchanged."""
        return _Pairs(_joined(self.before, self.after), _joined(self.after, self.before))


def _joined(first: RowStatistics, second: RowStatistics) -> RowStatistics:
    columns = np.concatenate([first.columns, second.columns])
    return RowStatistics(columns, np.concatenate([first.values, second.values]), first.shape)


def _kinds(*models: RowStatistics) -> tuple[list[RowStatistics], Whole]:
    """The distinct rows, as each model answers them, and how many there are of each: (kinds,) int64."""
    keys = np.array([key for model in models for key in model.keys])
    order = np.lexsort(keys[::-1])  # by the first key, then the second …
    changes = (np.diff(keys[:, order], axis=1) != 0).any(axis=0)
    starts = np.flatnonzero(np.concatenate([[True], changes]))
    counts = np.diff(starts, append=len(order))
    return [model.take(order[starts]) for model in models], counts


def _swap_test(pairs: _Pairs, counts: Whole, metric: Metric, resamples: int, generator: np.random.Generator) -> float:
    """Two-sided p-value: how often swapping each row's answers by a coin moves the metric as far as observed."""
    observed = abs(float(pairs.differences(metric, counts)))
    both = pairs.swappable()
    extreme = 0
    for size in _chunks(resamples, 2 * counts.size + 2 * pairs.width):
        swapped = generator.binomial(counts, 0.5, size=(size, counts.size))
        moved = both.differences(metric, np.concatenate([counts - swapped, swapped], axis=1))
        extreme += int((np.abs(moved) >= observed * (1 - 1e-12) - 1e-12).sum())  # equal up to the metric's rounding
    return (extreme + 1) / (resamples + 1)


def _mcnemar(before: RowStatistics, after: RowStatistics) -> float:
    """Exact two-sided p-value for accuracy (McNemar 1947): the discordant rows are as coin throws."""
    from scipy.stats import binomtest

    right_before, right_after = right_rows(before), right_rows(after)
    gained, lost = int((right_after & ~right_before).sum()), int((right_before & ~right_after).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _resampled(counts: Whole, width: int, resamples: int, generator: np.random.Generator) -> Iterator[Whole]:
    """Bootstrap counts of each kind of row, chunk by chunk: (≤ resamples, kinds), each row summing to all rows."""
    rows = counts.sum()
    for size in _chunks(resamples, counts.size + 2 * width):
        yield generator.multinomial(rows, counts / rows, size=size)


def _chunks(resamples: int, numbers_each: int) -> Iterator[int]:
    """Sizes that add up to `resamples`, each small enough for memory."""
    largest = max(1, _CHUNK_NUMBERS // numbers_each)
    for start in range(0, resamples, largest):
        yield min(largest, resamples - start)


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
