"""Magnitude: the smallest weights go (Han et al. 2015, arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moss_rlhf.model.grid import is_finite
from moss_rlhf.optimization.patterns import check_sparsity, lowest_of_all, lowest_of_matrix, whole


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mark the weights of smallest magnitude in one matrix (Han et al. 2015, §3).

    weight     any shape, any float dtype, finite. It is not changed.
    sparsity   share of the matrix to remove, 0 <= sparsity < 1, rounded down to whole weights; ties go by position.
    returns    bool, the weight's shape, True where a weight is to be zeroed.
    raises     ValueError on sparsity out of range or a weight that is not finite.
    """
    _refuse_infinite(weight)
    return lowest_of_matrix(weight.detach(), sparsity)


def global_magnitude_masks(weights: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """As `magnitude_mask`, with one threshold for all matrices: the lowest share of all weights together goes.

    The count is exact; of weights at the threshold itself, those of earlier matrices and positions go first. Memory
    beyond the masks: a few copies of the largest matrix. A mask may cover a whole matrix, which would cut the network
    in two: look for `mask.all()` before applying it.
    raises   ValueError as `magnitude_mask`, naming the matrix by its place.
    """
    check_sparsity(sparsity)
    for place, weight in enumerate(weights):
        _refuse_infinite(weight, f"weight {place}")
    wide = {weight.dtype == torch.float64 for weight in weights}
    matrices = weights if len(wide) == 1 else [weight.double() for weight in weights]  # compared in one precision
    return lowest_of_all(matrices, whole(sum(weight.numel() for weight in weights), sparsity))


def _refuse_infinite(weight: Tensor, name: str = "weight") -> None:
    if weight.numel() and not is_finite(weight.detach()):
        raise ValueError(f"{name} is not finite: the checkpoint holds inf or nan")
