"""Which layer groups train at a step, and which frozen stretches are worth a cache: pure arithmetic, no torch.

Groups are counted from 0, the embeddings, then the blocks from the lowest; the last is the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Literal

Unfreeze = Literal["all", "gradual", "head_first"]
_UNFROZEN_BY = 0.5  # share of the steps after which gradual unfreezing trains everything
_HEAD_ALONE = 1 / 3  # share of the steps in which head_first trains the head alone


def lowest_trained(step: int, total: int, groups: int, unfreeze: Unfreeze) -> int:
    """How many of `groups` groups are still frozen at a step: from the head down, the index of the lowest that trains.

    gradual      the head alone first, then one more group at a time, evenly; everything trains from half of the `total`
                 steps on. (ULMFiT §3.3 thaws one group an epoch; a transformer is fine-tuned for fewer epochs than it
                 has layers.)
    head_first   the head alone in the first third of the steps, then everything (Kumar et al. 2022, arXiv:2202.10054).
    """
    if unfreeze == "all":
        return 0
    if unfreeze == "head_first":
        return groups - 1 if step < head_alone(total) else 0
    thawed = 1 + int((groups - 1) * step / max(1, total * _UNFROZEN_BY))
    return max(0, groups - thawed)


def head_alone(total: int) -> int:
    """Steps of `total` in which head_first trains the head alone."""
    return int(total * _HEAD_ALONE)


def frozen_blocks(trains: Sequence[bool]) -> int:
    """How many of the lowest blocks are frozen, the embeddings with them; 0 where the embeddings train."""
    return max(0, list(trains).index(True) - 1)


@dataclass(frozen=True)
class Run:
    """Steps `start` … `stop` − 1, in which the embeddings and the lowest `blocks` blocks never train."""

    start: int
    stop: int
    blocks: int

    @property
    def steps(self) -> int:
        return self.stop - self.start


def frozen_runs(frozen: Sequence[int]) -> list[Run]:
    """Steps in a row with equally many frozen blocks.

    frozen   one number a step, as `frozen_blocks` gives it.
    """
    runs, start = [], 0
    for blocks, steps in groupby(frozen):
        stop = start + len(list(steps))
        runs.append(Run(start, stop, blocks))
        start = stop
    return runs


def cached_runs(frozen: Sequence[int], steps_per_epoch: int, least_epochs: float) -> list[Run]:
    """The runs whose frozen prefix is worth computing once.

    A cache below block c serves every step in which at least c blocks are frozen. Filling it costs a forward pass of c
    blocks over all rows, as much as one epoch without it, so a run of E epochs saves (E − 1) · c of them; the runs are
    chosen whose sum of savings is largest, none shorter than `least_epochs`.

    frozen   one number a step, as `frozen_blocks` gives it.
    """
    pieces = frozen_runs(frozen)

    @cache
    def best(first: int) -> tuple[float, int, tuple[Run, ...]]:
        """(saved, cached steps, the runs) of the pieces from `first` on."""
        if first == len(pieces):
            return 0.0, 0, ()
        found = best(first + 1)
        for last in range(first, len(pieces)):
            run = Run(pieces[first].start, pieces[last].stop, min(piece.blocks for piece in pieces[first : last + 1]))
            if not run.blocks:
                break
            if run.steps >= least_epochs * steps_per_epoch:
                saved, steps, others = best(last + 1)
                gain = (run.steps / steps_per_epoch - 1) * run.blocks
                found = max(found, (saved + gain, steps + run.steps, (run, *others)), key=lambda each: each[:2])
        return found

    return list(best(0)[2])
