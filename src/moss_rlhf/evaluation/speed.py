"""How fast runtimes answer: the same tokenized batches for each, in interleaved rounds after a warm-up, medians.

Tokenization is excluded. Rounds go A, B, C, A, B, C … so that a machine that slows down or heats up in the middle
slows all of them, and a median over rounds forgets a noisy moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle, islice
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.model.runtime import Batch, Runtime
from moss_rlhf.progress import Progress
from moss_rlhf.tasks.batching import Row, batches_of

Clock = Callable[[], float]
Seconds = NDArray[np.float64]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 9
_SAMPLED_BATCHES = (4, 64)  # at least, at most, between them as many as `rows_per_size` fills


class Percentiles(TypedDict):
    p50: float
    p95: float


class Speed(TypedDict):
    """By batch size, as text: milliseconds a batch, and examples a second."""

    latency_ms: dict[str, Percentiles]
    throughput: dict[str, float]


def speed_batches(
    rows: Sequence[Row],
    batch_sizes: Sequence[int],
    padding: Mapping[str, int],
    *,
    seed: int,
    rows_per_size: int = 256,
) -> dict[int, list[Batch]]:
    """Batches for `measure_speed`: a seeded sample of the rows in random order, as a service would see them.

    Each size gets `rows_per_size` rows, but no fewer than 4 batches and no more than 64, as far as the rows reach. All
    batches are full: what remains is left out, and rows are repeated where there are fewer than one batch of them.

    raises  ValueError where there are no rows, or on a batch size below 1.
    """
    if not rows:
        raise ValueError("rows is empty: speed is measured on texts; give at least one")
    shuffled = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows)).tolist()]
    counts = {size: _sample_size(size, len(rows), rows_per_size) for size in batch_sizes}
    return {size: list(batches_of([*islice(cycle(shuffled), n)], size, padding)) for size, n in counts.items()}


def measure_speed(
    runtimes: Mapping[str, Runtime],
    batches: Mapping[int, Sequence[Batch]],
    *,
    own: Mapping[str, Mapping[int, Sequence[Batch]]] | None = None,
    progress: Progress,
    rounds: int | None = None,
    budget_seconds: float = 60.0,
    warmup: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Speed]:
    """Time runtimes against each other on identical batches.

    Latency is the 50th and 95th percentile over batches of each batch's median over rounds. Throughput is examples a
    second over all batches, in the median round.

    runtimes        by the name that the result uses.
    batches         {batch size: batches}, as from `speed_batches`; at least one batch each.
    own             {runtime's name: the batches of the same texts as that runtime's tokenizer writes them}, for those
                    whose vocabulary is another.
    rounds          of measurement, for each runtime and batch size; None: as many as `budget_seconds` allows for all
                    sizes together, from 3 to 9, predicted from the last warm-up.
    warmup          rounds before, not counted; at least 1.
    raises          ValueError on rounds or warmup below 1, or a size without batches.
    """
    if warmup < 1 or (rounds is not None and rounds < 1):
        raise ValueError(f"warmup and rounds must be at least 1, got warmup {warmup} and rounds {rounds}")
    speeds = {name: Speed(latency_ms={}, throughput={}) for name in runtimes}
    for size, group in batches.items():
        if not group:
            raise ValueError(f"batches[{size}] is empty: give at least one batch of this size, or leave the size out")
        read = {name: (own or {}).get(name, batches)[size] for name in runtimes}
        expected = _warm_up(runtimes, read, warmup, clock)
        count = rounds or _affordable_rounds(expected, budget_seconds / len(batches))
        turns = [name for _ in range(count) for name in runtimes]
        tracked = progress.track(turns, f"speed, batch {size}", total=len(turns))
        for name, seconds in _measure(runtimes, read, tracked, clock).items():
            speeds[name]["latency_ms"][str(size)] = _latency(seconds)
            speeds[name]["throughput"][str(size)] = _throughput(seconds, group)
    return speeds


def _warm_up(
    runtimes: Mapping[str, Runtime], batches: Mapping[str, Sequence[Batch]], rounds: int, clock: Clock
) -> float:
    """Run everything without counting it; the seconds that the last round took."""
    for _ in range(rounds):
        seconds = sum(_time_batches(runtime, batches[name], clock).sum() for name, runtime in runtimes.items())
    return float(seconds)


def _affordable_rounds(seconds_each: float, budget_seconds: float) -> int:
    affordable = MOST_ROUNDS if seconds_each <= 0 else int(min(budget_seconds / seconds_each, MOST_ROUNDS))
    return max(FEWEST_ROUNDS, affordable)


def _measure(
    runtimes: Mapping[str, Runtime], batches: Mapping[str, Sequence[Batch]], turns: Iterable[str], clock: Clock
) -> dict[str, Seconds]:
    """{runtime: (rounds, batches) seconds}, the runtimes running in the order of `turns`."""
    timings: dict[str, list[Seconds]] = {name: [] for name in runtimes}
    for name in turns:
        timings[name].append(_time_batches(runtimes[name], batches[name], clock))
    return {name: np.stack(seconds) for name, seconds in timings.items()}


def _time_batches(runtime: Runtime, batches: Sequence[Batch], clock: Clock) -> Seconds:
    """(batches,) seconds."""
    seconds = np.empty(len(batches))
    for index, batch in enumerate(batches):
        start = clock()
        runtime.run(batch)
        seconds[index] = clock() - start
    return seconds


def _latency(seconds: Seconds) -> Percentiles:
    p50, p95 = np.percentile(1000 * np.median(seconds, axis=0), [50, 95])
    return Percentiles(p50=float(p50), p95=float(p95))


def _throughput(seconds: Seconds, batches: Sequence[Batch]) -> float:
    examples = sum(len(next(iter(batch.values()))) for batch in batches)
    return float(examples / np.median(seconds.sum(axis=1)))


def _sample_size(batch_size: int, available: int, rows_per_size: int) -> int:
    """Rows to sample: a whole number of batches, at least one."""
    _check_batch_size(batch_size)
    fewest, most = _SAMPLED_BATCHES
    wanted = min(max(rows_per_size // batch_size, fewest), most)
    return batch_size * max(1, min(wanted, available // batch_size))


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
