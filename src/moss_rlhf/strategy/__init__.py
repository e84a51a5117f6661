"""Schedules and stopping: pure functions."""

from moss_rlhf.strategy.schedules import SCHEDULES, Schedule, constant, linear, slanted_triangular
from moss_rlhf.strategy.stopping import Best, Judge
from moss_rlhf.strategy.thawing import Run, Unfreeze, cached_runs, frozen_blocks, lowest_trained

__all__ = [
    "SCHEDULES",
    "Best",
    "Judge",
    "Run",
    "Schedule",
    "Unfreeze",
    "cached_runs",
    "constant",
    "frozen_blocks",
    "linear",
    "lowest_trained",
    "slanted_triangular",
]
