"""Which widths, and which units: pure functions of scores and costs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BUCKETS = 8192  # the budget is counted in this many steps
_CANDIDATES = 64  # units on either side of a swap


def keep_highest(score: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` highest scores, ascending, int64; ties go to the lower index. score (units,)."""
    return score.argsort(descending=True, stable=True)[:kept].sort().values


def widths_of(units: int, multiple_of: int = 1) -> list[int]:
    """The widths that a part may have: the multiples up to `units`, and `units` itself; at least one multiple stays."""
    return [*range(multiple_of, units, multiple_of), units]


def losses_of(score: Tensor, widths: Sequence[int]) -> NDArray[np.float64]:
    """Σ of the scores that go when the highest `width` stay, for each width. score (units,)."""
    ascending = torch.cat([torch.zeros(1, dtype=torch.float64), score.double().sort().values.cumsum(0)])
    return ascending[[len(score) - width for width in widths]].numpy()


def cheapest_widths(
    losses: Sequence[NDArray[np.float64]], costs: Sequence[NDArray[np.float64]], budget: float
) -> list[int]:
    """One option for each part so that the losses' sum is least and the costs' sum within `budget`.

    The search of Kwon et al. 2022 (arXiv:2204.09656, §4.1, algorithm 1) takes heads and neurons of one cost each; this
    is the multiple-choice knapsack by dynamic programming, for any cost of any width, measured times included. Costs
    are rounded to 1/8192 of the budget, which is never overrun.

    losses, costs   (options,) a part, costs ≥ 0.
    returns         the index of each part's option.
    raises          ValueError where even the cheapest options cost more than `budget`.
    """
    floor = [float(cost.min()) for cost in costs]
    if sum(floor) > budget:
        raise ValueError(f"the smallest widths cost {sum(floor):.6g}, above the budget of {budget:.6g}")
    step = max((budget - sum(floor)) / _BUCKETS, 1e-300)
    best, chosen = np.zeros(_BUCKETS + 1), []
    for loss, cost, least in zip(losses, costs, floor, strict=True):
        steps = np.rint((cost - least) / step)
        best, option = _one_more(best, loss, steps)
        chosen.append((option, steps))
    found = (_trace(chosen, limit) for limit in range(_BUCKETS, -1, -1))
    return next(picks for picks in found if _total(costs, picks) <= budget * (1 + 1e-12))  # rounding may overrun


def _total(costs: Sequence[NDArray[np.float64]], picks: Sequence[int]) -> float:
    return sum(float(cost[pick]) for cost, pick in zip(costs, picks, strict=True))


def _one_more(
    best: NDArray[np.float64], loss: NDArray[np.float64], steps: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """best[b]: the least loss so far that costs at most b steps → the same with one part more, and its option."""
    found, option = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int32)
    for index, (lost, taken) in enumerate(zip(loss, steps, strict=True)):
        if taken <= _BUCKETS:
            start = int(taken)
            total = best[: len(best) - start] + lost
            better = total < found[start:]
            found[start:][better], option[start:][better] = total[better], index
    return found, option


def _trace(chosen: Sequence[tuple[NDArray[np.int32], NDArray[np.float64]]], bucket: int) -> list[int]:
    picks = []
    for option, steps in reversed(chosen):
        picks.append(int(option[bucket]))
        bucket -= int(steps[picks[-1]])
    return picks[::-1]


def rearrange(gradients: Tensor, kept: Tensor) -> Tensor:
    """Swap units of one part, kept for removed, while that lowers what removing all of them together costs.

    The cost of removing the set R is rᵀ F r, F = Σ_texts g gᵀ the Fisher matrix of the part's masks, r = 1 in R
    (Kwon et al. 2022, arXiv:2204.09656, §4.2). Each time the best swap is made among the units that are cheapest to
    give up and those dearest to miss; F is never formed.

    gradients   (texts, units) of the masks.
    kept        (kept,) indices, the warm start.
    returns     as many indices, ascending, int64.
    """
    values = gradients.double()
    own = values.square().sum(dim=0)
    removed = torch.ones(len(own), dtype=torch.bool)
    removed[kept] = False
    missing = values[:, removed].sum(dim=1)  # (texts,) the gradient of removing R
    while removed.any() and not removed.all():
        swap = _best_swap(values, own, removed, missing)
        if swap is None:
            break
        out, back = swap
        removed[out], removed[back] = True, False
        missing += values[:, out] - values[:, back]
    return (~removed).nonzero()[:, 0]


def _best_swap(values: Tensor, own: Tensor, removed: Tensor, missing: Tensor) -> tuple[Tensor, Tensor] | None:
    """(unit to remove, unit to take back) that lowers the cost most, or None; `missing` = values @ r."""
    together = values.T @ missing
    going = (own + 2 * together).masked_fill(removed, torch.inf)
    coming = (own - 2 * together).masked_fill(~removed, torch.inf)
    out = going.topk(min(_CANDIDATES, int((~removed).sum())), largest=False).indices
    back = coming.topk(min(_CANDIDATES, int(removed.sum())), largest=False).indices
    change = going[out][:, None] + coming[back] - 2 * values[:, out].T @ values[:, back]
    best = int(change.argmin())
    if change.flatten()[best] >= -1e-9 * own.sum():
        return None
    return out[best // len(back)], back[best % len(back)]
