"""The order of training rows: shuffled, in batches of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

_BATCHES_IN_A_POOL = 50  # rows are sorted within shuffled pools: little padding, and batches still differ every epoch


def bucketed_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
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


def random_order(lengths: Sequence[int], seed: int, epoch: int) -> NDArray[np.int64]:
    """A random permutation; a pure function of (seed, epoch)."""
    return np.random.default_rng((seed, epoch)).permutation(len(lengths))


class EpochSampler:
    """A torch sampler whose order depends on (seed, epoch) alone: a resumed run sees the rows it would have seen."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, bucketing: bool) -> None:
        self.lengths, self.batch_size, self.seed, self.bucketing = lengths, batch_size, seed, bucketing
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.bucketing:
            order = bucketed_order(self.lengths, self.batch_size, self.seed, self.epoch)
        else:
            order = random_order(self.lengths, self.seed, self.epoch)
        return iter(order.tolist())
