"""SparseGPT: zero weights column by column, and let the columns still to come make up for each error.

Frantar & Alistarh 2023, arXiv:2301.00774, algorithm 1. With inputs X and H = X Xᵀ, removing weight w_j costs w_j² · D_j
at best, and the best change of the columns after it is −w_j · V[j, :], where H = U D Uᵀ (U upper triangular with ones
on its diagonal, D diagonal) and V = U⁻¹: the paper's Cholesky factor of H⁻¹ is D^−½ V. The mask of 128 columns is
chosen when the walk reaches them.

Fast: a block of 128 columns hands its errors on to the rest of the matrix in one product, a panel of 32 to the rest of
its block likewise, and only within a panel is there a step a column. Columns are rows of memory, (in, out).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moss_rlhf.model.grid import Grid
from moss_rlhf.optimization.gptq import feedback, round_by_gptq
from moss_rlhf.optimization.patterns import Pattern, check_sparsity, pattern_mask

BLOCK = 128
PANEL = 32


@dataclass(frozen=True)
class Sparse:
    """A pruned matrix, and what it took.

    weight    (out, in) float32, zeros included.
    mask      (out, in) bool, True where it is zero by decision.
    damping   share of the mean diagonal that was added to the Hessian: more than asked for where that was too little.
    """

    weight: Tensor
    mask: Tensor
    damping: float


def sparsegpt(weight: Tensor, hessian: Tensor, sparsity: float, *, damping: float = 0.01) -> Tensor:
    """Prune one linear layer so that its outputs change least (Frantar & Alistarh 2023, algorithm 1).

    weight     (out, in), finite. It is not changed.
    hessian    (in, in), Σ x xᵀ over the calibration tokens, on any common scale.
    sparsity   share of every 128 columns, 0 <= sparsity < 1, rounded down to whole weights.
    damping    share of the mean of diag(H) added to it; × 10 as often as the factorization fails.
    returns    (out, in) float32: the new weight, zeros included.
    raises     ValueError on shapes that do not fit, inf or nan, sparsity out of range, or a Hessian that is none.
    """
    return prune_by_sparsegpt(weight, hessian, sparsity, damping=damping).weight


@torch.no_grad()
def prune_by_sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    *,
    pattern: Pattern = Pattern(),  # noqa: B008  # frozen
    grid: Grid | None = None,
    damping: float = 0.01,
) -> Sparse:
    """`sparsegpt` in any pattern, with what it took; with `grid`, what stays is rounded in the same pass (§3.4).

    The joint pass walks once more over the weights as they were, with the mask fixed: every column then makes up for
    the pruning and for the rounding of those before it.
    """
    _check(weight, hessian, sparsity)
    factor, diagonal, used = _factors(hessian, damping)
    columns, mask = weight.float().T.clone(memory_format=torch.contiguous_format), None
    dead = hessian.diagonal() == 0
    columns[dead] = 0  # what never had an input can go for free
    walk = _Walk(columns, factor, diagonal, sparsity, pattern)
    mask = walk.run().T
    if grid is None:
        return Sparse(walk.columns.T.contiguous(), mask.contiguous(), used)
    rounded = round_by_gptq(weight, hessian, grid, keep_largest=grid.symmetric, damping=damping, pruned=mask)
    return Sparse(rounded.weight, mask.contiguous(), rounded.damping)


def _factors(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor, float]:
    """V = U⁻¹ (in, in) and D (in,) of the damped H = U D Uᵀ, and the damping it took."""
    diagonal = hessian.diagonal()
    live = diagonal[diagonal > 0].double()
    normal = (hessian / live.mean() if len(live) else hessian).float()
    upper, used = feedback(normal, damping)
    pivots = _pivots(normal, upper, used)
    eye = torch.eye(len(upper), device=upper.device)
    return torch.linalg.solve_triangular(upper, eye, upper=True, unitriangular=True), pivots, used


def _pivots(hessian: Tensor, upper: Tensor, damping: float) -> Tensor:
    """D of hessian + damping · I = U D Uᵀ: Σ_j U[i, j]² D_j = H[i, i], solved from the last row up."""
    squares = upper.double().square()
    target = (hessian.diagonal().double() + damping)[:, None]
    return torch.linalg.solve_triangular(squares, target, upper=True, unitriangular=True)[:, 0].float().clamp_min(0)


class _Walk:
    """The walk over the columns (in, out); `columns` ends as the new weight."""

    def __init__(self, columns: Tensor, factor: Tensor, diagonal: Tensor, sparsity: float, pattern: Pattern) -> None:
        self.columns, self.factor, self.diagonal = columns, factor, diagonal
        self.sparsity, self.pattern = sparsity, pattern
        self.mask = torch.zeros_like(columns, dtype=torch.bool)
        self.errors = torch.zeros_like(columns)

    def run(self) -> Tensor:
        """(in, out) bool, what was zeroed."""
        width, block = len(self.columns), self._block()
        for start in range(0, width, block):
            stop = min(start + block, width)
            if self.pattern.keep is None:
                self._choose(start, stop)
            for first in range(start, stop, self._panel()):
                last = min(first + self._panel(), stop)
                self._panel_of(first, last)
                self._hand_on(first, last, last, stop)
            self._hand_on(start, stop, stop, width)
        return self.mask

    def _block(self) -> int:
        of = self.pattern.keep[1] if self.pattern.keep else self.pattern.block[1] if self.pattern.block else 1
        return max(1, BLOCK // of) * of

    def _panel(self) -> int:
        of = self.pattern.keep[1] if self.pattern.keep else 1
        return max(1, PANEL // of) * of

    def _choose(self, start: int, stop: int) -> None:
        """Mark the weights of columns start … stop whose removal costs least, w² · D."""
        cost = (self.columns[start:stop].square() * self.diagonal[start:stop, None]).T
        self.mask[start:stop] = pattern_mask(cost, self.pattern, self.sparsity, by_row=False).T

    def _panel_of(self, first: int, last: int) -> None:
        for column in range(first, last):
            if self.pattern.keep is not None and (column - first) % self.pattern.keep[1] == 0:
                self._choose(column, column + self.pattern.keep[1])
            lost = torch.mul(self.columns[column], self.mask[column], out=self.errors[column])
            if column + 1 < last:
                self.columns[column + 1 : last].addr_(self.factor[column, column + 1 : last], lost, alpha=-1)
            self.columns[column].masked_fill_(self.mask[column], 0)

    def _hand_on(self, start: int, stop: int, first: int, last: int) -> None:
        if first < last:
            self.columns[first:last].addmm_(self.factor[start:stop, first:last].T, self.errors[start:stop], alpha=-1)


def _check(weight: Tensor, hessian: Tensor, sparsity: float) -> None:
    check_sparsity(sparsity)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    if hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"hessian must be ({weight.shape[1]}, {weight.shape[1]}), got {tuple(hessian.shape)}")
    if not weight.isfinite().all():
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    if not hessian.isfinite().all():
        raise ValueError("hessian is not finite: look for inf or nan in the calibration batch")
