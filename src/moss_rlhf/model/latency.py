"""What parts of a block cost in seconds, measured at a few widths, straight lines between them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import linear, scaled_dot_product_attention

Seconds = NDArray[np.float64]

_POINTS = 6
_ROUNDS, _WARM_UP = 7, 2
_MOST_ROUNDS = 15


@dataclass(frozen=True)
class PartShape:
    """What decides how long a part takes.

    units       heads (or key-value heads with their queries) of an attention, neurons of a feed-forward.
    head_size   0 of a feed-forward.
    queries     query heads a unit; 0 of a feed-forward.
    matrices    of a feed-forward: 2, or 3 where it is gated.
    """

    hidden: int
    units: int
    head_size: int = 0
    queries: int = 0
    matrices: int = 2


Measure = Callable[[PartShape, int], float]
"""(shape, units that stay) → seconds of one run of the part."""


def measured_points(units: int, points: int = _POINTS) -> list[int]:
    """Widths to measure, ascending, from one unit to all."""
    return sorted({max(1, round(units * index / points)) for index in range(points + 1)})


def latency_table(shape: PartShape, widths: Sequence[int], measure: Measure) -> Seconds:
    """Seconds of a part at `widths`, (widths,): measured at a few, interpolated, never falling with the width."""
    points = measured_points(shape.units)
    seconds = np.maximum.accumulate([measure(shape, width) for width in points])
    return np.interp(widths, points, seconds)


def latency_tables(
    shapes: Mapping[str, PartShape], widths: Mapping[str, Sequence[int]], measure: Measure
) -> dict[str, Seconds]:
    """`latency_table` by name; parts of one shape are measured once."""
    known: dict[tuple[PartShape, int], float] = {}

    def once(shape: PartShape, width: int) -> float:
        if (shape, width) not in known:
            known[shape, width] = measure(shape, width)
        return known[shape, width]

    return {name: latency_table(shape, widths[name], once) for name, shape in shapes.items()}


def torch_seconds(rows: int = 8, length: int = 64) -> Measure:
    """A measure: PyTorch's matrix products of the part on this machine, float32, median of rounds after a warm-up."""

    def measure(shape: PartShape, width: int) -> float:
        run = _attention(shape, width, rows, length) if shape.head_size else _feed_forward(shape, width, rows, length)
        with torch.inference_mode():
            return statistics.median([_clock(run) for _ in range(_WARM_UP + _ROUNDS)][_WARM_UP:])

    return measure


def _clock(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    return clock() - start


@dataclass(frozen=True)
class Compared:
    """Median seconds of two networks on one batch, and how it was done."""

    before: float
    after: float
    rows: int
    rounds: int

    def __str__(self) -> str:
        times = [f"{1000 * seconds:.3g} ms" for seconds in (self.before, self.after)]
        how = f"batches of {self.rows}, {self.rounds} rounds in turns, other work on the machine not excluded"
        return f"{times[0]} → {times[1]} in PyTorch, {self.before / self.after:.2f} times as fast ({how})"


def compare_seconds(
    before: Callable[[], Any],
    after: Callable[[], Any],
    *,
    rows: int,
    within: Callable[[], AbstractContextManager[Any]] = nullcontext,
    budget: float = 1.5,
    clock: Callable[[], float] = time.perf_counter,
) -> Compared:
    """Time two calls in turns, before after before after …, after one warm-up of each; medians.

    rows     that a call answers; only told.
    within   what `after` needs to be in; entering and leaving it is not timed.
    budget   seconds for all of it, warm-up included, of which the warm-up tells how many rounds fit: 1 to 15.
    """

    def both() -> tuple[float, float]:
        first = _clock(before, clock)
        with within():
            return first, _clock(after, clock)

    rounds = max(1, min(_MOST_ROUNDS, int(budget / max(sum(both()), 1e-9)) - 1))
    found = [both() for _ in range(rounds)]
    first, second = (statistics.median(seconds) for seconds in zip(*found, strict=True))
    return Compared(first, second, rows, rounds)


def _attention(shape: PartShape, units: int, rows: int, length: int) -> Callable[[], object]:
    size, heads = shape.head_size, units * shape.queries
    entering = torch.randn(rows, length, shape.hidden)
    query, output = torch.randn(heads * size, shape.hidden), torch.randn(shape.hidden, heads * size)
    key = torch.randn(units * size, shape.hidden)

    def run() -> object:
        projected = (linear(entering, weight).view(rows, length, -1, size) for weight in (query, key, key))
        q, k, v = (part.transpose(1, 2) for part in projected)
        k, v = (part.repeat_interleave(shape.queries, dim=1) for part in (k, v))
        return linear(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), output)

    return run


def _feed_forward(shape: PartShape, width: int, rows: int, length: int) -> Callable[[], object]:
    entering = torch.randn(rows, length, shape.hidden)
    ups = [torch.randn(width, shape.hidden) for _ in range(shape.matrices - 1)]
    down = torch.randn(shape.hidden, width)

    def run() -> object:
        inside = torch.relu(linear(entering, ups[0]))
        for up in ups[1:]:
            inside = inside * linear(entering, up)
        return linear(inside, down)

    return run
