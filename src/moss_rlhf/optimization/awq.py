"""AWQ: before rounding, scale up the input features that carry large activations, so that they lose less.

Lin et al. 2023, arXiv:2306.00978. X Wᵀ = (X / s) (W · s)ᵀ for any s > 0, one an input feature. A feature with s above
1 is rounded on a grid that is finer for it; the others pay, through the group's scale. §3.2 searches s = a^α, with a
the mean |x| of each feature, for the α that changes the outputs least.

The scales are common to all matrices that read the same activations, and 1 / s is folded into what makes them
(`smoothquant.fold_scales`): the matrices W · s are what lies on the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moss_rlhf.model.grid import Grid, is_finite, round_to_grid
from moss_rlhf.optimization.gptq import output_error

_LEAST = 1e-4  # of the mean activation, the published code's bound: a dead feature would ask for a scale of 0


@dataclass(frozen=True)
class Scaling:
    """What the search found.

    scales     (in,) float32, > 0; the geometric mean of the largest and the smallest is 1.
    exponent   α; 0 where no scaling is best, and then all scales are 1.
    error      ‖(W − Q(W · s) / s) X‖² with these scales.
    plain      the same without scales: rounding to nearest.
    """

    scales: Tensor
    exponent: float
    error: float
    plain: float


@torch.no_grad()
def awq_scales(weight: Tensor, gram: Tensor, activation: Tensor, grid: Grid, *, points: int = 20) -> Scaling:
    """Search the exponent α in 0, 1/points … 1 whose scales s = activation^α lose least (arXiv:2306.00978, §3.2).

    The loss needs no activations: ‖D X‖² = tr(D G Dᵀ), D = W − Q(W · s) / s, G = X Xᵀ. Ties go to the lower exponent.

    weight       (out, in), float32 or less, finite; all matrices that read the same activations, one below the other.
    gram         (in, in), Σ x xᵀ over the calibration tokens.
    activation   (in,), mean |x| of each feature (the root mean square serves as well), on any common scale.
    points       steps from 0 to 1, at least 1.
    raises       ValueError on shapes that do not fit, inf or nan, negative activations, points below 1, or groups
                 that do not fill a row.
    """
    _check(weight, gram, activation, points)
    weight, gram = weight.float(), gram.float()
    candidates = [(step / points, _scales(activation, step / points)) for step in range(points + 1)]
    errors = [output_error(weight - round_to_grid(weight * scales, grid) / scales, gram) for _, scales in candidates]
    best = min(range(len(errors)), key=errors.__getitem__)
    exponent, scales = candidates[best]
    return Scaling(scales, exponent, errors[best], errors[0])


def _scales(activation: Tensor, exponent: float) -> Tensor:
    relative = activation.double() / activation.double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    scales = relative.clamp_min(_LEAST) ** exponent
    return (scales / (scales.max() * scales.min()).sqrt()).float()


def _check(weight: Tensor, gram: Tensor, activation: Tensor, points: int) -> None:
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    width = weight.shape[1]
    if gram.shape != (width, width) or activation.shape != (width,):
        raise ValueError(
            f"gram must be ({width}, {width}) and activation ({width},), "
            f"got {tuple(gram.shape)} and {tuple(activation.shape)}"
        )
    if points < 1:
        raise ValueError(f"points must be at least 1, got {points}")
    if not is_finite(weight):
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    if not is_finite(gram) or not is_finite(activation) or (activation < 0).any():
        raise ValueError("gram and activation must be finite, activation >= 0: look for inf or nan in the batch")
