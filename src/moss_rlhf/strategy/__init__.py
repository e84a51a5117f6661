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
from moss_rlhf.strategy.stopping import Best

__all__ = [
    "SCHEDULES",
    "Best",
    "Schedule",
    "constant",
    "cosine",
    "inverse_sqrt",
    "linear",
    "one_cycle",
    "polynomial",
    "reductions",
    "shaped",
    "slanted_triangular",
    "warmup_stable_decay",
]
