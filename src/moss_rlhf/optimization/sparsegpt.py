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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moss_rlhf.model.grid import Grid, grid_parameters, is_finite
from moss_rlhf.optimization.factor import Factor, check_hessian, factorize
from moss_rlhf.optimization.patterns import Pattern, check_sparsity, pattern_mask, whole

BLOCK = 128
PANEL = 32
_WORTHLESS = 1e-12  # the cost of a weight whose input was always 0, against its cost by damping alone


@dataclass(frozen=True)
class Sparse:
    """A pruned matrix, and what it took.

    weight    (out, in) float32, zeros included.
    mask      (out, in) bool, True where it is zero by decision.
    damping   share of the mean diagonal that was added to the Hessian: more than asked for where that was too little.
    scale     (out, groups) float32, and zero (out, groups) int32: the grid that the kept weights lie on, or None.
    """

    weight: Tensor
    mask: Tensor
    damping: float
    scale: Tensor | None = None
    zero: Tensor | None = None


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
    grid: Grid | None = None,
    damping: float = 0.01,
) -> Sparse:
    """`sparsegpt` in any pattern, with what it took; with `grid`, what stays is rounded in the same pass (§3.4).

    Every column then makes up for the pruning and the rounding of those before it, and the masks of later columns are
    chosen knowing of both. Scales come from the weights as they were.
    An n:m pattern says its sparsity by itself: `sparsity` is not read. Weights of inputs that were 0 in every token go
    first, the smallest of them ahead.
    raises   ValueError as `sparsegpt`; a pattern or groups that do not fit the matrix.
    """
    _check(weight, hessian, sparsity, damping)
    factor = factorize(hessian, damping)
    factor.pivots[hessian.diagonal() == 0] *= _WORTHLESS
    rounding = None if grid is None else _Rounding(weight, grid)
    walk = _Walk(weight, factor, sparsity, pattern, rounding)
    walk.run()
    pruned = walk.result.T.contiguous()
    mask = walk.mask.T.contiguous()
    if rounding is None:
        return Sparse(pruned, mask, factor.damping)
    return Sparse(pruned, mask, factor.damping, rounding.scale.T.contiguous(), rounding.zero.T.contiguous())


class _Rounding:
    """Rounds a column at a time to a grid whose scales were found beforehand."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        scale, zero = grid_parameters(weight, grid)
        self.group, self.scale, self.zero = grid.group_width(weight.shape[1]), scale.T.contiguous(), zero.T
        self.least, self.most = grid.lowest - self.zero.contiguous(), grid.highest - self.zero.contiguous()

    def __call__(self, values: Tensor, column: int) -> Tensor:
        """Round values (out,) of a column in place."""
        group = column // self.group
        steps = values.div_(self.scale[group]).round_()
        return torch.clamp(steps, self.least[group], self.most[group], out=steps).mul_(self.scale[group])


class _Walk:
    """The walk over the columns, all matrices (in, out)."""

    def __init__(
        self, weight: Tensor, factor: Factor, sparsity: float, pattern: Pattern, rounding: _Rounding | None
    ) -> None:
        self.upper, self.pivots = factor.upper, factor.pivots
        self.sparsity, self.pattern, self.rounding = sparsity, pattern, rounding
        self.lost = weight.float().T.clone(memory_format=torch.contiguous_format)  # W − Ŵ, once a column is done
        self.result = self.lost.clone()  # W + Σ (W − Ŵ) U, and once a column is done Ŵ
        self.mask = torch.zeros_like(self.lost, dtype=torch.bool)
        self.units = pattern.keep[1] if pattern.keep else pattern.block[1] if pattern.block else 1
        self.chosen_at = pattern.keep[1] if pattern.keep else max(1, BLOCK // self.units) * self.units

    def run(self) -> None:
        widths = [max(1, BLOCK // self.units) * self.units, max(1, PANEL // self.units) * self.units, self.chosen_at]
        self._step(0, len(self.lost), sorted(set(widths), reverse=True))

    def _step(self, start: int, stop: int, widths: list[int]) -> None:
        """Do the columns start … stop in steps of widths[0]; what lies before `start` has been handed on to them."""
        if not widths:
            return self._columns(start, stop)
        for first in range(start, stop, widths[0]):
            last = min(first + widths[0], stop)
            if first > start:
                here = slice(start, first)
                self.result[first:last].addmm_(self.upper[here, first:last].T, self.lost[here])
            if widths[0] == self.chosen_at:
                self._choose(first, last)
            self._step(first, last, widths[1:])
        return None

    def _columns(self, first: int, last: int) -> None:
        for column in range(first, last):
            values = self.result[column]
            if column > first:
                values.addmv_(self.lost[first:column].T, self.upper[first:column, column])
            if self.rounding is not None:
                self.rounding(values, column)
            values.masked_fill_(self.mask[column], 0)
            self.lost[column].sub_(values)

    def _choose(self, first: int, last: int) -> None:
        """Mark the weights of columns first … last whose removal costs least."""
        here = slice(first, last)
        zeros = self.lost[here] == 0
        cost = self._expected(here).square_().mul_(self.pivots[here, None]).masked_fill_(zeros, 0)
        torch.logical_or(pattern_mask(cost.T, self.pattern, self._share(here), by_row=False).T, zeros, out=self.mask[here])

    def _expected(self, here: slice) -> Tensor:
        """The columns `here` as they would all become if none of them were removed: W + Δ, where Δ + Δ Ů = C.

        C is what the columns before have added; Ů, the part of U above its diagonal, hands on what moved each column.
        """
        added = self.result[here] - self.lost[here]
        moved = torch.linalg.solve_triangular(self.upper[here, here].T, added, upper=False, unitriangular=True)
        return moved.add_(self.lost[here])

    def _share(self, here: slice) -> float:
        """The share of these columns that makes the share of all columns up to them come out in whole units."""
        rows, columns = self.pattern.block or (1, 1)
        each = self.lost.shape[1] // rows
        before, after = each * (here.start // columns), each * (here.stop // columns)
        return (whole(after, self.sparsity) - whole(before, self.sparsity)) / (after - before)


def _check(weight: Tensor, hessian: Tensor, sparsity: float, damping: float) -> None:
    check_sparsity(sparsity)
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    check_hessian(hessian, weight.shape[1], damping)
    if not is_finite(weight):
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
