"""Learning-rate schedules: pure functions of the step, returning the multiplier of the base rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Schedule = Callable[[int, int, float], float]

_ULMFIT_RATIO = 32  # how much smaller the lowest rate is than the largest (Howard & Ruder 2018, §3.2)


def constant(step: int, total: int, warmup: float) -> float:
    """Rises linearly over the share `warmup` of the `total` steps, then stays at 1."""
    return min(1.0, _rise(step, total, warmup))


def linear(step: int, total: int, warmup: float) -> float:
    """Rises linearly over the share `warmup` of the `total` steps, then falls linearly to 0."""
    rise = _rise(step, total, warmup)
    peak = int(total * warmup)
    return rise if step < peak else max(0.0, (total - step) / max(1, total - peak))


def slanted_triangular(step: int, total: int, warmup: float) -> float:
    """ULMFiT's triangle, from 1/32 up to 1 over the share `warmup` and down again (arXiv:1801.06146, eq. 3)."""
    cut = max(1, int(total * warmup))
    height = step / cut if step < cut else 1 - (step - cut) / max(1, total - cut)
    return (1 + max(0.0, height) * (_ULMFIT_RATIO - 1)) / _ULMFIT_RATIO


def _rise(step: int, total: int, warmup: float) -> float:
    peak = int(total * warmup)
    return (step + 1) / (peak + 1) if step < peak else 1.0


SCHEDULES: Mapping[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "slanted_triangular": slanted_triangular,
}
