"""GPTQ: round a matrix to a grid column by column, and let the columns still to come make up for each error.

Frantar et al. 2022, arXiv:2210.17323. For one linear layer with inputs X, the rounded weight is to minimise
‖(W − Ŵ) X‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ), H = X Xᵀ. Algorithm 1 walks over the Cholesky factor of H⁻¹. This module takes
the equal form without an inverse (LDLQ; Chee et al. 2023, arXiv:2307.13304, theorem 6): with H = U D Uᵀ, U upper
triangular with ones on its diagonal,

    Ŵ[:, j] = round(W[:, j] + Σ_{k<j} (W − Ŵ)[:, k] · U[k, j])

and U comes out of one Cholesky factorization of H read backwards: a quarter of the arithmetic, and better conditioned.

Fast: a block of 128 columns is corrected among itself, then the rest of the matrix in one product; within a block the
same in panels of 32; within a panel each column gathers its correction in one product. Columns are held as rows of
memory, (in, out), so that each step reads and writes what lies together.

Two things beyond the paper take off a fourth to a half of the error that is left, and `quantize` asks for both. Scales
may clip a group's largest weights where that rounds the others better, as AWQ and the authors' later code do. And once
all columns are rounded, sweeps of coordinate descent go on (`descent.py`): where one changes nothing, no single code
could be better.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moss_rlhf.model.grid import Grid, integer_grid, is_finite, scale_and_zero
from moss_rlhf.optimization.descent import sweep
from moss_rlhf.optimization.factor import check_hessian, factorize, mean_diagonal

BLOCK = 128
PANEL = 32
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75)  # of the scale that reaches the largest weight; below, int4 never gained


@dataclass(frozen=True)
class Solution:
    """A matrix on its grid, and what it took.

    weight    (out, in) float32, = dequantize(codes, scale, zero) exactly.
    scale     (out, groups) float32.
    zero      (out, groups) int32.
    damping   the share of the mean diagonal that was added: more than asked for where that was not enough.
    dead      input features that were 0 in every token; their weights are rounded to nearest.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor
    damping: float
    dead: int


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int = 4,
    group_size: int | None = None,
    *,
    symmetric: bool = False,
    activation_order: bool = False,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one linear layer so that its outputs change least (Frantar et al. 2022, arXiv:2210.17323, algorithm 1).

    weight             (out, in), float32 or less, finite. It is not changed.
    hessian            (in, in), Σ x xᵀ over the calibration tokens, on any common scale.
    bits               2 … 8.
    group_size         input features that share a scale; it must divide `in`. None or -1: one scale a row.
    symmetric          codes −L … L without a zero point, instead of 0 … L with one.
    activation_order   columns of large diag(H) first, groups staying where they are: their scales come from the
                       weights as they were (the published code's act-order with static groups).
    damping            share of the mean of diag(H) added to it; × 10 as often as the factorization fails.
    returns            (weight on the grid, (out, in) float32; scales (out, groups) float32; zeros (out, groups) int32):
                       weight / scale + zero is the integer code. Keep the scales: GPTQ may leave the ends of a
                       group's range unused, and then the weights alone do not tell them.
    raises             ValueError as `round_by_gptq`.
    """
    grid = integer_grid(bits, group_size, symmetric=symmetric)
    found = round_by_gptq(weight, hessian, grid, activation_order=activation_order, damping=damping)
    return found.weight, found.scale, found.zero


@torch.no_grad()
def round_by_gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    *,
    activation_order: bool = False,
    static_groups: bool = False,
    keep_largest: bool = False,
    damping: float = 0.01,
    pruned: Tensor | None = None,
    clip: bool = False,
    sweeps: int = 0,
) -> Solution:
    """`gptq` on any grid (INT8 too), with what it took.

    static_groups   scales of groups from the weights as they were; else from the weights as the errors of the groups
                    before have moved them, which clips less. Implied by activation_order.
    keep_largest    hold the largest weight of each group at its largest code: then max|weight| / highest gives the
                    scale back bit for bit, and exporters that look for it find this grid. For symmetric grids.
    pruned          (out, in) bool, True where the weight must become exactly 0; the others make up for it, too.
    clip            the scale of each group is the best of 1 and CLIPS for rounding its columns to nearest, each
                    weighted by its diag(H).
    sweeps          of coordinate descent after the walk; each takes twice the products of the walk.
    raises          ValueError on shapes that do not fit, inf or nan, groups that do not fill a row, a Hessian that is
                    no gram matrix, or keep_largest on an asymmetric grid.
    """
    _check(weight, hessian, grid, damping, pruned)
    if keep_largest and not grid.symmetric:
        raise ValueError("keep_largest needs a symmetric grid; store the scales of an asymmetric one instead")
    dead = hessian.diagonal() == 0
    order = hessian.diagonal().argsort(descending=True, stable=True) if activation_order else None
    factor = factorize(hessian if order is None else hessian[order][:, order], damping)
    static = static_groups or activation_order
    importance = hessian.diagonal().float() if clip else None
    rounding = _Rounding(
        weight, grid, order, static=static, keep_largest=keep_largest, pruned=pruned, importance=importance
    )
    rounding.run(factor.upper)
    for _ in range(sweeps):
        rounding.sweep(hessian, factor.damping * mean_diagonal(hessian))
    rounded = rounding.weight()
    scale, zero = rounding.scale.T.contiguous(), rounding.zero.T.to(torch.int32).contiguous()
    return Solution(rounded, scale, zero, factor.damping, int(dead.sum()))


def output_error(difference: Tensor, gram: Tensor) -> float:
    """‖D X‖² = tr(D G Dᵀ), what a change of weights D (out, in) does to the outputs; gram (in, in) = Σ x xᵀ."""
    return float(((difference @ gram) * difference).sum(dtype=torch.float64))


class _Rounding:
    """The walk over the columns. Matrices are held as (in, out), columns in the order of the walk."""

    def __init__(
        self,
        weight: Tensor,
        grid: Grid,
        order: Tensor | None,
        *,
        static: bool,
        keep_largest: bool,
        pruned: Tensor | None,
        importance: Tensor | None,
    ) -> None:
        out_features, width = weight.shape
        self.importance = importance
        self.grid, self.order, self.group = grid, order, grid.group_width(width)
        self.keep_largest, self.static = keep_largest, static or self.group == width
        self.scale = weight.new_ones(width // self.group, out_features, dtype=torch.float32)
        self.zero = torch.zeros_like(self.scale)
        self.least, self.most = self.scale * grid.lowest, self.scale * grid.highest  # steps from zero
        columns = weight.float().T
        self.pruned = None if pruned is None else pruned.T
        # the code a weight must get, as steps from zero; nan: free to be rounded. None: all are free
        self.held = torch.full(columns.shape, torch.nan, device=weight.device) if self._holds else None
        if self.static:
            for start in range(0, width, self.group):
                self._fit(columns[start : start + self.group], start)
        # W, and once a column is rounded W − Ŵ; never the caller's memory, which a single row or column would be
        self.lost = self._ordered(columns).clone(memory_format=torch.contiguous_format)
        self.moved = self.lost.clone()  # W + Σ (W − Ŵ) U, and once a column is rounded its steps from zero
        self.held = None if self.held is None else self._ordered(self.held)

    @property
    def _holds(self) -> bool:
        return self.keep_largest or self.pruned is not None

    def _ordered(self, columns: Tensor) -> Tensor:
        return columns if self.order is None else columns[self.order]

    def run(self, factor: Tensor) -> None:
        """Round every column; factor (in, in), from `factorize`, in the order of the walk."""
        owner = self._owner()
        for start, stop in pairwise(_stops(len(owner), self.group)):
            for first, last in _panels(start, stop, self.group):
                if not self.static and first % self.group == 0:
                    self._fit(self._expected(first, factor), first)
                self._round(first, last, owner, factor)
                self._correct(first, last, last, stop, factor)
            self._correct(start, stop, stop, len(owner), factor)

    def sweep(self, hessian: Tensor, damping: float) -> None:
        """Coordinate descent, see `descent.sweep`."""
        owner = self._owner()

        def change(column: int, wanted: Tensor) -> Tensor:
            group, steps = owner[column], self.moved[column]
            scale = self.scale[group]
            best = self._allowed(wanted.div_(scale).add_(steps).round_(), column, group)
            changed = (best - steps).mul_(scale)
            steps.copy_(best)
            return changed

        sweep(self.lost, hessian, damping, change, self.order)

    def _owner(self) -> list[int]:
        """The group of each column, in the order of the walk."""
        return self._ordered(torch.arange(len(self.lost), device=self.lost.device) // self.group).tolist()

    def _allowed(self, steps: Tensor, column: int, group: int) -> Tensor:
        """Steps within the grid's ends, in place, and held where they must be."""
        torch.clamp(steps, self.least[group], self.most[group], out=steps)
        if self.held is not None:
            torch.where(self.held[column].isnan(), steps, self.held[column], out=steps)
        return steps

    def weight(self) -> Tensor:
        """(out, in), columns back in their place."""
        steps = self.moved if self.order is None else self.moved[self.order.argsort()]
        steps.reshape(len(self.scale), self.group, -1).mul_(self.scale[:, None])
        return steps.T.contiguous()

    def _expected(self, start: int, factor: Tensor) -> Tensor:
        """The columns of the group at `start` (group, out) as they would all become if none of them were rounded.

        This is where algorithm 1 holds them at that moment. Here a column is complete only at its turn: the columns
        of its own group still have to hand on what moved them, Δ = C + Δ Ů with C what the groups before have added.
        """
        here = slice(start, start + self.group)
        added = self.moved[here] - self.lost[here]
        one = torch.eye(self.group, device=factor.device)
        handed_on = torch.linalg.solve_triangular(factor[here, here].T, one, upper=False, unitriangular=True)
        return torch.addmm(self.lost[here], handed_on, added)

    def _fit(self, columns: Tensor, start: int) -> None:
        """Find the scale and zero of the group of columns (group, out) that begins at `start`."""
        group, here = start // self.group, slice(start, start + self.group)
        if self.pruned is not None:
            columns = columns.masked_fill(self.pruned[here], 0)
        scale, zero = self._scale_and_zero(columns, here)
        self.scale[group], self.zero[group] = scale, zero
        self.least[group], self.most[group] = self.grid.lowest - zero, self.grid.highest - zero
        if self.held is not None:
            self.held[here] = self._holdings(columns, here)

    def _scale_and_zero(self, columns: Tensor, here: slice) -> tuple[Tensor, Tensor]:
        """Of a group (group, out): what reaches its ends, or clips them where that rounds the columns better."""
        least, most = columns.amin(dim=0), columns.amax(dim=0)
        found = scale_and_zero(least, most, self.grid)
        if self.importance is None:
            return found
        scale, zero = found
        lowest = self._loss(columns, scale, zero, self.importance[here])
        for share in CLIPS:
            narrow, shifted = scale_and_zero(share * least, share * most, self.grid)
            loss = self._loss(columns, narrow, shifted, self.importance[here])
            better = loss < lowest
            scale, zero = torch.where(better, narrow, scale), torch.where(better, shifted, zero)
            lowest = torch.where(better, loss, lowest)
        return scale, zero

    def _loss(self, columns: Tensor, scale: Tensor, zero: Tensor, importance: Tensor) -> Tensor:
        """Σ_j importance[j] · (what rounding column j to nearest changes)², (out,)."""
        steps = (columns / scale).round_().clamp_(self.grid.lowest - zero, self.grid.highest - zero)
        return importance @ steps.mul_(scale).sub_(columns).square_()

    def _holdings(self, columns: Tensor, here: slice) -> Tensor:
        held = torch.full_like(columns, torch.nan)
        if self.keep_largest:
            largest = columns.abs().argmax(dim=0, keepdim=True)
            steps = (columns / self.scale[here.start // self.group]).round().clamp(self.grid.lowest, self.grid.highest)
            held.scatter_(0, largest, steps.gather(0, largest))
        return held if self.pruned is None else held.masked_fill(self.pruned[here], 0)

    def _round(self, first: int, last: int, owner: list[int], factor: Tensor) -> None:
        """Round the columns of a panel one after the other; each is corrected for those before it in the panel."""
        for column in range(first, last):
            group, moved = owner[column], self.moved[column]
            scale = self.scale[group]
            if column > first:
                moved.addmv_(self.lost[first:column].T, factor[first:column, column])
            steps = self._allowed(moved.div_(scale).round_(), column, group)
            self.lost[column].addcmul_(steps, scale, value=-1)

    def _correct(self, start: int, stop: int, first: int, last: int, factor: Tensor) -> None:
        """Add to the columns first … last what the columns start … stop lost."""
        if first < last:
            self.moved[first:last].addmm_(factor[start:stop, first:last].T, self.lost[start:stop])


def _stops(width: int, group: int) -> list[int]:
    """Where blocks begin and end: at most BLOCK columns each, and no block holds a part of one group and of another."""
    step = max(1, BLOCK // group) * group  # several small groups, or one large group cut into blocks
    return [*(at for begin in range(0, width, step) for at in range(begin, min(begin + step, width), BLOCK)), width]


def _panels(start: int, stop: int, group: int) -> Iterator[tuple[int, int]]:
    """Cut a block into panels, anew at every group: a group's scale is found when all before it has been corrected."""
    begins = {at for at in range(start, stop) if (at - start) % PANEL == 0 or at % group == 0}
    return pairwise([*sorted(begins), stop])


def _check(weight: Tensor, hessian: Tensor, grid: Grid, damping: float, pruned: Tensor | None) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    width = weight.shape[1]
    grid.group_width(width)
    if pruned is not None and pruned.shape != weight.shape:
        raise ValueError(f"pruned must be {tuple(weight.shape)}, got {tuple(pruned.shape)}")
    if not is_finite(weight):
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    check_hessian(hessian, width, damping)
