"""Magnitude: the smallest weights go (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moss_rlhf.optimization.patterns import check_sparsity, lowest_of_matrix


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mark the weights of smallest magnitude in one matrix (Han et al. 2015, §3).

    weight     any shape, any float dtype, finite. It is not changed.
    sparsity   share of the matrix to remove, 0 <= sparsity < 1, rounded down to whole weights; ties go by position.
    returns    bool, the weight's shape, True where a weight is to be zeroed.
    raises     ValueError on sparsity out of range or a weight that is not finite.
    """
    _refuse_infinite(weight)
    return lowest_of_matrix(weight.detach().abs(), sparsity)


def global_magnitude_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """As `magnitude_mask`, with one threshold for all matrices: the lowest share of all weights together goes.

    The count is exact; of weights at the threshold itself, those of earlier matrices and positions go first.
    """
    check_sparsity(sparsity)
    for weight in weights:
        _refuse_infinite(weight)
    total = sum(weight.numel() for weight in weights)
    removed = int(total * sparsity + 1e-9)
    if removed == 0:
        return [torch.zeros_like(weight, dtype=torch.bool) for weight in weights]
    magnitudes = torch.cat([weight.detach().abs().flatten().float() for weight in weights])
    threshold = magnitudes.kthvalue(removed).values
    mask = magnitudes < threshold
    at = (magnitudes == threshold).nonzero()[:, 0][: removed - int(mask.sum())]
    mask[at] = True
    sizes = [weight.numel() for weight in weights]
    return [part.reshape(weight.shape) for part, weight in zip(mask.split(sizes), weights, strict=True)]


def _refuse_infinite(weight: Tensor) -> None:
    if not weight.isfinite().all():
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
