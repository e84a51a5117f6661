"""Which layer groups train at a step, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moss_rlhf.strategy import Schedule, Unfreeze, lowest_trained
from moss_rlhf.strategy.thawing import head_alone


class Timetable(Protocol):
    """A pure function of the step. Groups count from 0, the embeddings; the last is the head."""

    @property
    def peaks(self) -> tuple[float, ...]:
        """The highest learning rate of each group."""

    def trains(self, step: int) -> tuple[bool, ...]:
        """Whether each group moves."""

    def multiplier(self, step: int, group: int) -> float:
        """A group's learning rate at a step, as a share of its peak."""


@dataclass(frozen=True)
class Thaw:
    """One schedule for all groups, of which all train, or more and more of them.

    peaks      one a group.
    schedule   of `steps` steps, the share `warmup` of which the rate rises.
    order      the groups from the first that trains to the last that thaws; empty: from the head down.
    """

    peaks: tuple[float, ...]
    unfreeze: Unfreeze
    schedule: Schedule
    warmup: float
    steps: int
    order: tuple[int, ...] = ()

    def trains(self, step: int) -> tuple[bool, ...]:
        groups = len(self.peaks)
        thawed = groups - lowest_trained(step, self.steps, groups, self.unfreeze)
        moving = set((self.order or tuple(reversed(range(groups))))[:thawed])
        return tuple(group in moving for group in range(groups))

    def multiplier(self, step: int, group: int) -> float:
        return self.schedule(step, self.steps, self.warmup)


@dataclass(frozen=True)
class Stretch:
    """Steps in which the same groups train.

    rates      each group's highest; 0: it is frozen.
    schedule   of these steps alone, the share `warmup` of which the rate rises.
    """

    rates: tuple[float, ...]
    schedule: Schedule
    warmup: float
    steps: int


@dataclass(frozen=True)
class Phases:
    """One stretch after the other, each with a schedule of its own."""

    stretches: tuple[Stretch, ...]

    @property
    def peaks(self) -> tuple[float, ...]:
        return tuple(max(rates) for rates in zip(*(stretch.rates for stretch in self.stretches), strict=True))

    def trains(self, step: int) -> tuple[bool, ...]:
        return tuple(rate > 0 for rate in self._at(step)[0].rates)

    def multiplier(self, step: int, group: int) -> float:
        stretch, since = self._at(step)
        peak = max(other.rates[group] for other in self.stretches)
        share = stretch.rates[group] / peak if peak else 0.0
        return share * stretch.schedule(since, stretch.steps, stretch.warmup)

    def _at(self, step: int) -> tuple[Stretch, int]:
        """The stretch of a step, and how many of its steps came before; the last one's goes on."""
        since = step
        for stretch in self.stretches[:-1]:
            if since < stretch.steps:
                return stretch, since
            since -= stretch.steps
        return self.stretches[-1], since


def head_first(rates: Sequence[float], schedule: Schedule, warmup: float, steps: int) -> Phases:
    """Linear probing, then fine-tuning: the head alone, then everything, each with the whole schedule.

    The head is fitted before anything below it moves, so its random start does not distort what was pretrained (Kumar
    et al. 2022, arXiv:2202.10054).
    """
    alone = head_alone(steps)
    probing = Stretch((*(0.0 for _ in rates[:-1]), rates[-1]), schedule, warmup, alone)
    tuning = Stretch(tuple(rates), schedule, warmup, steps - alone)
    return Phases((probing, tuning) if alone else (tuning,))
