"""Schedules and stopping: pure functions."""

from moss_rlhf.strategy.schedules import (
    SCHEDULES,
    Schedule,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    reductions,
    shaped,
    slanted_triangular,
    warmup_stable_decay,
)
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
    "cosine",
    "frozen_blocks",
    "inverse_sqrt",
    "linear",
    "lowest_trained",
    "one_cycle",
    "polynomial",
    "reductions",
    "shaped",
    "slanted_triangular",
    "warmup_stable_decay",
]
