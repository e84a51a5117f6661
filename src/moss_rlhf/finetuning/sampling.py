"""The order of training rows: shuffled, in batches of similar lengths. Pure functions of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

_BATCHES_IN_A_POOL = 50  # rows are sorted within shuffled pools: little padding, and batches still differ every epoch
_BLUR = 0.1  # of a row's length: how far token-budget batches mix rows of unequal lengths

Positions = NDArray[np.int64]
Batches = list[Positions]


def bucketed_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> Positions:
    """An order whose consecutive batches hold rows of similar lengths; a pure function of (seed, epoch).

    A random permutation is cut into pools of 50 batches, each sorted by length, and the batches are shuffled; the one
    batch that is not full comes last.
    """
    random = np.random.default_rng((seed, epoch))
    shuffled = random.permutation(len(lengths))
    pool = _BATCHES_IN_A_POOL * batch_size
    keys = np.asarray(lengths)[shuffled]
    ordered = shuffled[np.lexsort((keys, np.arange(len(shuffled)) // pool))]
    full = len(ordered) // batch_size
    batches = ordered[: full * batch_size].reshape(full, batch_size)
    return np.concatenate([batches[random.permutation(full)].reshape(-1), ordered[full * batch_size :]])


def random_order(lengths: Sequence[int], seed: int, epoch: int) -> Positions:
    """A random permutation; a pure function of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(len(lengths))


def budgeted_sizes(lengths: Sequence[int], tokens: int) -> list[int]:
    """How many rows each batch takes, the rows sorted by length, so that rows × longest stays within `tokens`.

    A row that is longer than the budget is a batch of its own. The sizes depend on the lengths alone: every epoch has
    the same number of steps, which schedules and resuming need.
    """
    sizes, count = [], 0
    for length in np.sort(np.asarray(lengths)):
        if count and (count + 1) * length > tokens:
            sizes.append(count)
            count = 0
        count += 1
    return [*sizes, count]


def budgeted_batches(lengths: Sequence[int], sizes: Sequence[int], seed: int, epoch: int) -> Batches:
    """Batches of `budgeted_sizes`, their rows sorted by slightly blurred lengths, and shuffled."""
    random = np.random.default_rng((seed, epoch))
    blurred = np.asarray(lengths) * (1 + _BLUR * random.random(len(lengths)))
    batches = np.split(np.argsort(blurred, kind="stable"), np.cumsum(sizes)[:-1])
    return [batches[position] for position in random.permutation(len(batches))]


class EpochBatches:
    """A torch batch sampler whose order depends on (seed, epoch) alone: a resumed run sees the rows it would have seen.

    rows   how many an epoch has; len() is its number of batches.
    """

    def __init__(self, rows: int, steps: int, batches: Callable[[int], Batches]) -> None:
        self.rows, self._steps, self._batches = rows, steps, batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self._batches(self.epoch):
            yield batch.tolist()


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, *, bucketing: bool, tokens: int | None = None
) -> EpochBatches:
    """The batches of every epoch.

    batch_size   rows of a batch.
    bucketing    batches of similar lengths; else in random order.
    tokens       instead of `batch_size` rows, as many as fill this many tokens, padding included.
    """
    if tokens is not None:
        sizes = budgeted_sizes(lengths, int(tokens / (1 + _BLUR)))
        return EpochBatches(len(lengths), len(sizes), partial(budgeted_batches, lengths, sizes, seed))
    steps = -(-len(lengths) // batch_size)

    def batches(epoch: int) -> Batches:
        order = bucketed_order(lengths, batch_size, seed, epoch) if bucketing else random_order(lengths, seed, epoch)
        return np.split(order, range(batch_size, len(order), batch_size))

    return EpochBatches(len(lengths), steps, batches)
