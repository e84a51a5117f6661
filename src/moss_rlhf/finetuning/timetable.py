"""Which layer groups train at a step, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from moss_rlhf.strategy import Schedule

Unfreeze = Literal["all", "gradual"]
_UNFROZEN_BY = 0.5  # share of the steps after which gradual unfreezing trains everything


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
    """One schedule for all groups, of which all train, or more and more from the head down.

    peaks      one a group.
    schedule   of `steps` steps, the share `warmup` of which the rate rises.
    """

    peaks: tuple[float, ...]
    unfreeze: Unfreeze
    schedule: Schedule
    warmup: float
    steps: int

    def trains(self, step: int) -> tuple[bool, ...]:
        lowest = lowest_trained(step, self.steps, len(self.peaks), self.unfreeze)
        return tuple(group >= lowest for group in range(len(self.peaks)))

    def multiplier(self, step: int, group: int) -> float:
        return self.schedule(step, self.steps, self.warmup)


def lowest_trained(step: int, total: int, groups: int, unfreeze: Unfreeze) -> int:
    """Index of the lowest of `groups` groups that trains at a step.

    gradual: the head alone first, then one more group at a time from the top, evenly; everything trains from half of
    the `total` steps on. (ULMFiT §3.3 thaws one group an epoch; a transformer is fine-tuned for fewer epochs than it
    has layers.)
    """
    if unfreeze == "all":
        return 0
    thawed = 1 + int((groups - 1) * step / max(1, total * _UNFROZEN_BY))
    return max(0, groups - thawed)
