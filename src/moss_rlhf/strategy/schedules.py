"""Learning-rate schedules: pure functions of the step, returning the multiplier of the base rate.

All rise over the first c = ⌊total · warmup⌋ steps, linearly unless they say otherwise, and from there on d is the share
of the rest that is over: (step − c) / (total − c). They are drawn in docs/schedules.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from moss_rlhf.strategy.stopping import Best

Schedule = Callable[[int, int, float], float]

_ULMFIT_RATIO = 32  # how much smaller the lowest rate is than the largest (Howard & Ruder 2018, §3.2)
_ONE_CYCLE_START, _ONE_CYCLE_END = 1 / 25, 1 / 250_000  # of the peak, as PyTorch's OneCycleLR has them


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


def cosine(step: int, total: int, warmup: float) -> float:
    """(1 + cos πd) / 2: half a wave down to 0 (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, one period)."""
    return _rise(step, total, warmup) * (1 + math.cos(math.pi * _gone(step, total, warmup))) / 2


def polynomial(step: int, total: int, warmup: float, power: float = 2.0) -> float:
    """(1 − d)^power, down to 0; power 1 is linear."""
    return float(_rise(step, total, warmup) * (1 - _gone(step, total, warmup)) ** power)


def inverse_sqrt(step: int, total: int, warmup: float) -> float:
    """√((c + 1) / (step + 1)) after the rise (Vaswani et al. 2017, arXiv:1706.03762, §5.3, with 1 as its peak)."""
    return min(_rise(step, total, warmup), math.sqrt((int(total * warmup) + 1) / (step + 1)))


def one_cycle(step: int, total: int, warmup: float) -> float:
    """Half a wave from 1/25 up to 1, and half a wave down to 1/250,000 (Smith 2018, arXiv:1803.09820; rates alone)."""
    peak = int(total * warmup)
    if step < peak:
        return _wave(_ONE_CYCLE_START, 1.0, step / peak)
    return _wave(1.0, _ONE_CYCLE_END, _gone(step, total, warmup))


def warmup_stable_decay(step: int, total: int, warmup: float, decay: float = 0.2) -> float:
    """1 after the rise, then linearly to 0 over the last ⌊total · decay⌋ steps (Hu et al. 2024, arXiv:2404.06395)."""
    falling = min(int(total * decay), total - int(total * warmup))
    fall = (total - step) / falling if falling else 1.0
    return max(0.0, min(_rise(step, total, warmup), fall))


def reductions(metrics: Sequence[tuple[float, float]], patience: int, lower_is_better: bool = False) -> int:
    """How often a rate was reduced: each time that `patience` evaluations in a row brought nothing better.

    metrics   (metric, loss) of each evaluation so far; better is what `Best` says.
    """
    best, waited, count = Best(lower_is_better=lower_is_better), 0, 0
    for step, (metric, loss) in enumerate(metrics):
        best = best.after(metric, loss, step)
        waited = waited + 1 if best.waited else 0
        if waited == patience:
            waited, count = 0, count + 1
    return count


def _rise(step: int, total: int, warmup: float) -> float:
    peak = int(total * warmup)
    return (step + 1) / (peak + 1) if step < peak else 1.0


def _gone(step: int, total: int, warmup: float) -> float:
    """d, 0 to 1."""
    peak = int(total * warmup)
    return min(1.0, max(0, step - peak) / max(1, total - peak))


def _wave(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


SCHEDULES: Mapping[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "polynomial": polynomial,
    "inverse_sqrt": inverse_sqrt,
    "slanted_triangular": slanted_triangular,
    "one_cycle": one_cycle,
    "warmup_stable_decay": warmup_stable_decay,
    "reduce_on_plateau": constant,  # the trainer multiplies by factor^reductions, which follow from its evaluations
}


def shaped(name: str, power: float | None = None, decay: float | None = None) -> Schedule:
    """The schedule of a name, with the constants that are its own."""
    if name == "polynomial" and power is not None:
        return partial(polynomial, power=power)
    if name == "warmup_stable_decay" and decay is not None:
        return partial(warmup_stable_decay, decay=decay)
    return SCHEDULES[name]
