"""SparseGPT: zero weights column by column, and let the columns still to come make up for each error.

Frantar & Alistarh 2023, arXiv:2301.00774. For one linear layer with inputs X the new weight is to minimise
‖(W − Ŵ) X‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ), H = X Xᵀ. Algorithm 1 walks over the Cholesky factor of H⁻¹. This module takes
the equal form without an inverse, as gptq.py does: with H = U D Uᵀ, U upper triangular with ones on its diagonal,

    Ŵ[:, j] = keep[:, j] · (W[:, j] + Σ_{k<j} (W − Ŵ)[:, k] · U[k, j])

and removing weight w of column j costs w² · D_j. The mask of 128 columns is chosen when the walk reaches them, by the
weights as they would all become if none of these 128 were removed (where algorithm 1 holds them at that moment).

Fast: each block of 128 columns gathers its corrections from all columns before it in one product, each panel of 32
from the rest of its block likewise, and only within a panel is there a step a column. Columns are held as rows of
memory, (in, out), so that a step reads and writes what lies together. Thresholds are counted, nothing is sorted.

Beyond the paper: sweeps of coordinate descent may follow the walk (`descent.py`), and `prune` asks for them. A walk
makes up for a removed weight in later columns only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moss_rlhf.model.grid import is_finite
from moss_rlhf.optimization.descent import sweep
from moss_rlhf.optimization.factor import Factor, check_hessian, factorize, mean_diagonal
from moss_rlhf.optimization.patterns import (
    all_but_highest,
    check_fit,
    check_sparsity,
    lowest_of_all,
    lowest_tiles,
    whole,
)
from moss_rlhf.recipe.pattern import Pattern

BLOCK = 128
PANEL = 32
_WORTHLESS = 1e-12  # the cost of a weight whose input was always 0, against its cost by damping alone


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

    weight     (out, in), float32 or less, finite. It is not changed. What is zero in it stays zero.
    hessian    (in, in), Σ x xᵀ over the calibration tokens, on any common scale.
    sparsity   share of the matrix, 0 <= sparsity < 1, rounded down to whole weights; every 128 columns lose the same
               share of all their rows together.
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
    damping: float = 0.01,
    sweeps: int = 0,
) -> Sparse:
    """`sparsegpt` in any pattern, with what it took.

    Weights of inputs that were 0 in every token go first, the smallest of them ahead.

    pattern   n:m says its sparsity by itself and `sparsity` is not read; of blocks, those of the least summed cost go.
    sweeps    of coordinate descent over the weights that stay, after the walk: many of them end where the least squares
              of each row over what it keeps do. Each takes about the products of the walk.
    raises    ValueError as `sparsegpt`, or where the pattern does not fit the matrix.
    """
    _check(weight, hessian, sparsity, damping)
    check_fit(weight.shape, pattern)
    factor = factorize(hessian, damping)
    factor.pivots[hessian.diagonal() == 0] *= _WORTHLESS
    walk = _Walk(weight, factor, sparsity, pattern)
    walk.run()
    for _ in range(sweeps):
        walk.sweep(hessian, factor.damping * mean_diagonal(hessian))
    return Sparse(walk.result.T.contiguous(), walk.mask.T.contiguous(), factor.damping)


class _Walk:
    """The walk over the columns, all matrices (in, out)."""

    def __init__(self, weight: Tensor, factor: Factor, sparsity: float, pattern: Pattern) -> None:
        self.upper, self.pivots = factor.upper, factor.pivots
        self.sparsity, self.pattern = sparsity, pattern
        self.lost = weight.float().T.clone(memory_format=torch.contiguous_format)  # W − Ŵ, once a column is done
        self.result = self.lost.clone()  # W + Σ (W − Ŵ) U, and once a column is done Ŵ
        self.mask = self.lost == 0
        self.had_zeros = bool(self.mask.any())
        together = pattern.keep[1] if pattern.keep else pattern.block[1] if pattern.block else 1
        self.block, panel = (max(1, size // together) * together for size in (BLOCK, PANEL))
        self.chosen = together if pattern.keep else self.block  # columns whose mask is chosen at once
        self.widths = sorted({self.block, panel, self.chosen}, reverse=True)

    def run(self) -> None:
        self._walk(0, len(self.lost), self.widths)

    def sweep(self, hessian: Tensor, damping: float) -> None:
        """Coordinate descent over what stays, see `descent.sweep`."""

        def change(column: int, wanted: Tensor) -> Tensor:
            self.result[column] += wanted.masked_fill_(self.mask[column], 0)
            return wanted

        sweep(self.lost, hessian, damping, change)

    def _walk(self, start: int, stop: int, widths: list[int]) -> None:
        """Do the columns start … stop in steps of widths[0]; those before `start` have handed on to them already."""
        for first in range(start, stop, widths[0]):
            last = min(first + widths[0], stop)
            if first > start:
                self.result[first:last].addmm_(self.upper[start:first, first:last].T, self.lost[start:first])
            if widths[0] == self.chosen:
                self._choose(slice(first, last))
            if len(widths) > 1:
                self._walk(first, last, widths[1:])
            else:
                self._columns(first, last)

    def _columns(self, first: int, last: int) -> None:
        for column in range(first, last):
            values = self.result[column]
            if column > first:
                values.addmv_(self.lost[first:column].T, self.upper[first:column, column])
            values.masked_fill_(self.mask[column], 0)
            self.lost[column].sub_(values)

    def _choose(self, here: slice) -> None:
        """Mark the weights of the columns `here` whose removal costs least."""
        cost = self._expected(here).square_().mul_(self.pivots[here, None])
        self.mask[here].logical_or_(self._lowest(cost, here))

    def _lowest(self, cost: Tensor, here: slice) -> Tensor:
        if self.pattern.keep is not None:
            return all_but_highest(cost.T, *self.pattern.keep).T
        if self.pattern.block is not None:
            return lowest_tiles(cost.T, self._removed(here), self.pattern.block).T
        return lowest_of_all([cost], self._removed(here))[0]

    def _expected(self, here: slice) -> Tensor:
        """The columns `here` as they would all become if no more of them were removed: W + Δ, where Δ + Δ Ů = C.

        C is what the columns before have added; Ů, the part of U above its diagonal, hands on what moved each column.
        """
        added = self.result[here] - self.lost[here]
        handing_on = self.upper[here, here].T
        moved: Tensor = torch.linalg.solve_triangular(handing_on, added, upper=False, unitriangular=True)
        moved.add_(self.lost[here])
        return moved.masked_fill_(self.mask[here], 0) if self.had_zeros else moved

    def _removed(self, here: slice) -> int:
        """How many weights, or blocks of them, go here: the share of all columns up to them comes out rounded down."""
        rows, columns = self.pattern.block or (1, 1)
        each = self.lost.shape[1] // rows
        before, after = (whole(each * (column // columns), self.sparsity) for column in (here.start, here.stop))
        return after - before


def _check(weight: Tensor, hessian: Tensor, sparsity: float, damping: float) -> None:
    check_sparsity(sparsity)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    check_hessian(hessian, weight.shape[1], damping)
    if not is_finite(weight):
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
