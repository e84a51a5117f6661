"""Random whole numbers that depend on a key alone: the same in every process, in any order, on every machine."""

from __future__ import annotations

from collections.abc import Callable, MutableSequence, Sequence
from itertools import compress
from typing import TypeVar

Item = TypeVar("Item")

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_TRIES = 8  # beyond the positions asked for; then all items are looked at
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


def key_of(*numbers: int) -> int:
    """64 bits that name a sequence of whole numbers (SplitMix64's finalizer, Steele et al. 2014, over each in turn)."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class Draws:
    """A stream of draws: Knuth's linear congruence modulo 2⁶⁴, of which the upper 32 bits count.

    Seeding it takes a hundredth of what seeding `random.Random` does, which matters for one stream a row.
    """

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1, count at most 2³²."""
        self._state = state = (self._state * _MULTIPLIER + _INCREMENT) & _MASK
        return (state >> 32) * count >> 32

    def positions(self, items: Sequence[Item], wanted: Callable[[Item], object], count: int) -> list[int]:
        """`count` different positions of wanted items, in random order, each set as likely; fewer where fewer are.

        A few drawn items are looked at first, which mostly is enough, and all of them where luck fails. The draws are
        `below`'s, written out: half of an operation's time is here.
        """
        chosen: list[int] = []
        length, state = len(items), self._state
        for _ in range(count + _TRIES if length and count else 0):
            state = (state * _MULTIPLIER + _INCREMENT) & _MASK
            position = (state >> 32) * length >> 32
            if wanted(items[position]) and position not in chosen:
                chosen.append(position)
                if len(chosen) == count:
                    self._state = state
                    return chosen
        self._state = state
        return self.some(list(compress(range(length), map(wanted, items))), count)

    def share(self) -> float:
        """A number in [0, 1), a multiple of 2⁻³²."""
        return self.below(2**32) / 2**32

    def one(self, items: Sequence[Item]) -> Item:
        """One of the items."""
        return items[self.below(len(items))]

    def take(self, items: MutableSequence[Item]) -> Item:
        """One of the items, which is taken out of them; their order changes."""
        position = self.below(len(items))
        items[position], items[-1] = items[-1], items[position]
        return items.pop()

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """`count` different ones of the items, or all where there are fewer, in random order."""
        left = list(items)
        return [self.take(left) for _ in range(min(count, len(left)))]
