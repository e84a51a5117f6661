"""Schedules and stopping: pure functions."""

from moss_rlhf.strategy.schedules import SCHEDULES, Schedule, constant, linear, slanted_triangular
from moss_rlhf.strategy.stopping import Best, Judge

__all__ = ["SCHEDULES", "Best", "Judge", "Schedule", "constant", "linear", "slanted_triangular"]
