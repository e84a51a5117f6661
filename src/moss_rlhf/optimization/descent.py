"""Coordinate descent on ‖(W − Ŵ) X‖²: what GPTQ and SparseGPT go on by once their one walk over the columns is done.

With H = X Xᵀ + damping · I, and all other columns held, column j of Ŵ is best at

    Ŵ[:, j] + (W − Ŵ) H[:, j] / H[j, j]

so a sweep over the columns never raises the error (Behdin et al. 2023, arXiv:2309.01885, algorithm 1). A walk makes up
for an error in later columns only; a sweep does in earlier ones, too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
PANEL = 32


def sweep(
    lost: Tensor,
    hessian: Tensor,
    damping: float,
    change: Callable[[int, Tensor], Tensor],
    order: Tensor | None = None,
) -> None:
    """One turn over all columns, in place.

    lost      (in, out) float32, W − Ŵ, rows in the order of the walk.
    hessian   (in, in), columns as they stand; `damping` is added to its diagonal.
    change    given a column's position and by how much (out,) it wants to change, changes it and says by how much. The
              tensor that it gets is its own to use.
    order     (in,), the column that each row of `lost` is; None: as they stand.
    """
    for start in range(0, len(lost), BLOCK):
        here = slice(start, min(start + BLOCK, len(lost)))
        rows = (hessian[here] if order is None else hessian[order[here]][:, order]).float()
        pull = (rows @ lost).add_(lost[here], alpha=damping)
        own = rows[:, here]
        changed = torch.zeros_like(pull)
        for first in range(0, len(pull), PANEL):
            last = min(first + PANEL, len(pull))
            pull[first:last].addmm_(own[:first, first:last].T, changed[:first], alpha=-1)
            for index in range(first, last):
                pull[index].addmv_(changed[first:index].T, own[first:index, index], alpha=-1)
                changed[index] = change(start + index, pull[index].div_(own[index, index] + damping))
        lost[here] -= changed
