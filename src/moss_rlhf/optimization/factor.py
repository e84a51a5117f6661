"""The factorization that the solvers which correct later columns for earlier ones walk over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_HIGHEST_DAMPING = 10.0  # of the mean diagonal: ten times what makes any gram definite in float32


@dataclass(frozen=True)
class Factor:
    """H + λ·I = U D Uᵀ, with H scaled so that the mean of its diagonal over the features that live is 1.

    upper     U (in, in) float32, upper triangular with ones on its diagonal.
    pivots    D (in,) float32, > 0: 1 / [H⁻¹ of the columns from j on]_jj, what one unit of weight j costs at best.
    damping   λ: more than asked for where that did not make H positive definite.
    """

    upper: Tensor
    pivots: Tensor
    damping: float


def factorize(hessian: Tensor, damping: float) -> Factor:
    """U D Uᵀ of a gram matrix (in, in): one Cholesky factorization read backwards, instead of two and an inverse.

    damping   share of the mean diagonal added to the diagonal; × 10 as often as the factorization fails.
    raises    ValueError where it fails at 10 times the mean diagonal, too.
    """
    backwards = hessian.flip(0, 1).float()
    backwards /= mean_diagonal(hessian)
    diagonal = backwards.diagonal().clone()
    while True:
        backwards.diagonal().copy_(diagonal + damping)
        lower, failure = torch.linalg.cholesky_ex(backwards.mT)  # its own transpose, and the layout LAPACK wants
        if not failure:
            del backwards
            upper = lower.flip(0, 1)
            roots = upper.diagonal().clone()
            return Factor(upper.div_(roots), roots.square(), damping)
        if damping >= _HIGHEST_DAMPING:
            raise ValueError(
                f"hessian is not positive semi-definite: damping of {damping:g} times its mean diagonal does not mend "
                "it. Pass the sum of x xᵀ over the calibration tokens."
            )
        damping = min(max(10 * damping, 1e-6), _HIGHEST_DAMPING)


def mean_diagonal(hessian: Tensor) -> float:
    """The mean over the features that live, what damping is a share of; 1 where none lives."""
    diagonal = hessian.diagonal()
    live = diagonal[diagonal > 0].double()
    return float(live.mean()) if len(live) else 1.0


def check_hessian(hessian: Tensor, width: int, damping: float) -> None:
    """ValueError where it is no finite gram matrix (width, width), or the damping is out of range."""
    if hessian.shape != (width, width):
        raise ValueError(f"hessian must be ({width}, {width}), got {tuple(hessian.shape)}")
    sums = hessian.sum(dim=0), hessian.sum(dim=1)  # reading the matrix once: a transpose costs as much as a Cholesky
    if not sums[0].isfinite().all():
        raise ValueError("hessian is not finite: look for inf or nan in the calibration batch")
    slack = 1e-3 * width * hessian.diagonal().abs().max()
    if (sums[0] - sums[1]).abs().max() > slack or (hessian.diagonal() < 0).any():
        raise ValueError("hessian is no gram matrix (symmetric, diagonal >= 0): pass the sum of x xᵀ over the tokens")
    if not 0 <= damping <= _HIGHEST_DAMPING:
        raise ValueError(f"damping must be in [0, {_HIGHEST_DAMPING:g}], got {damping}")
