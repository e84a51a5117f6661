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

from moss_rlhf.model.grid import Grid, is_finite, scale_and_zero
from moss_rlhf.optimization.factor import Factor, check_hessian, factorize
from moss_rlhf.optimization.patterns import (
    Pattern,
    all_but_highest,
    check_fit,
    check_sparsity,
    lowest_of_all,
    lowest_tiles,
    whole,
)

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
    chosen knowing of both. Weights of inputs that were 0 in every token go first, the smallest of them ahead.

    pattern   n:m says its sparsity by itself and `sparsity` is not read; of blocks, those of the least summed cost go.
    grid      a group's scale comes from its weights as the columns before have moved them where groups fill a block of
              128 columns, else from the weights as they were. On a symmetric grid the largest weight of each group
              stays and is held at the largest code, as long as the sparsity leaves that many weights: then the scales
              can be found from the weights.
    raises    ValueError as `sparsegpt`, or where the pattern or the groups do not fit the matrix.
    """
    _check(weight, hessian, sparsity, damping)
    check_fit(weight.shape, pattern)
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
    """Rounds a column at a time to a grid. Matrices (in, out) and (groups, out)."""

    def __init__(self, weight: Tensor, grid: Grid) -> None:
        self.grid, self.group = grid, grid.group_width(weight.shape[1])
        columns = weight.float().T
        self.scale = columns.new_ones(len(columns) // self.group, columns.shape[1])
        self.zero = torch.zeros_like(self.scale, dtype=torch.int32)
        # the code that a weight must get, 0: none. Symmetric grids hold the largest weight of each group at the end of
        # the codes: then max|weight| / highest gives the scale back, and exporters that look for it find this grid
        self.held = torch.zeros_like(columns, memory_format=torch.contiguous_format) if grid.symmetric else None
        self.fit(columns, 0)

    def fit(self, columns: Tensor, start: int) -> None:
        """Find scales and zeros of the whole groups in `columns`, of which `start` is the first."""
        groups = columns.reshape(-1, self.group, columns.shape[1])
        first, stop = start // self.group, start // self.group + len(groups)
        self.scale[first:stop], self.zero[first:stop] = scale_and_zero(
            groups.amin(dim=1), groups.amax(dim=1), self.grid
        )
        if self.held is not None:
            largest = groups.abs().argmax(dim=1, keepdim=True)
            codes = groups.gather(1, largest).sign() * self.grid.highest
            held = torch.zeros_like(groups).scatter_(1, largest, codes)
            self.held[start : start + len(columns)] = held.flatten(0, 1)

    def round(self, values: Tensor, column: int) -> None:
        """Round the values (out,) of a column in place."""
        group = column // self.group
        scale, zero = self.scale[group], self.zero[group]
        values.div_(scale).round_().clamp_(self.grid.lowest - zero, self.grid.highest - zero)
        if self.held is not None:
            values.copy_(torch.where(self.held[column] == 0, values, self.held[column]))
        values.mul_(scale)


class _Walk:
    """The walk over the columns, all matrices (in, out)."""

    def __init__(
        self, weight: Tensor, factor: Factor, sparsity: float, pattern: Pattern, rounding: _Rounding | None
    ) -> None:
        self.upper, self.pivots = factor.upper, factor.pivots
        self.sparsity, self.pattern, self.rounding = sparsity, pattern, rounding
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

    def _walk(self, start: int, stop: int, widths: list[int]) -> None:
        """Do the columns start … stop in steps of widths[0]; those before `start` have handed on to them already."""
        for first in range(start, stop, widths[0]):
            last = min(first + widths[0], stop)
            if first > start:
                self.result[first:last].addmm_(self.upper[start:first, first:last].T, self.lost[start:first])
            self._prepare(slice(first, last), widths[0])
            if len(widths) > 1:
                self._walk(first, last, widths[1:])
            else:
                self._columns(first, last)

    def _prepare(self, here: slice, width: int) -> None:
        """Find the grid of a block's groups where they fill it, and the mask of columns that share one."""
        rounding = self.rounding
        if rounding is not None and width == self.block and rounding.grid.group_size and not width % rounding.group:
            rounding.fit(self._expected(here), here.start)
        if width == self.chosen:
            self._choose(here)

    def _columns(self, first: int, last: int) -> None:
        for column in range(first, last):
            values = self.result[column]
            if column > first:
                values.addmv_(self.lost[first:column].T, self.upper[first:column, column])
            if self.rounding is not None:
                self.rounding.round(values, column)
            values.masked_fill_(self.mask[column], 0)
            self.lost[column].sub_(values)

    def _choose(self, here: slice) -> None:
        """Mark the weights of the columns `here` whose removal costs least."""
        cost = self._expected(here).square_().mul_(self.pivots[here, None])
        if self.rounding is not None and self.rounding.held is not None:
            cost.masked_fill_(self.rounding.held[here] != 0, torch.inf)
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
