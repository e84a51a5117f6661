"""Wanda: prune by weight times input norm, without training (Sun et al. 2023, arXiv:2306.11695)."""

from __future__ import annotations

import torch
from torch import Tensor

from moss_rlhf.optimization.patterns import all_but_highest, lowest_of_rows


@torch.no_grad()
def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|weight[o, i]| · input_norm[i], (out, in) float32 (eq. 1).

    weight      (out, in), any float dtype. It is not changed.
    input_norm  (in,), L2 norm of each input feature over the calibration tokens; 0 for an input that never spoke.
    raises      ValueError on a wrong shape, weights or norms that are not finite, or a norm below 0.
    """
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"weight must be (out, in), got {tuple(weight.shape)}")
    if input_norm.shape != weight.shape[1:]:
        raise ValueError(f"input_norm must be ({weight.shape[1]},), got {tuple(input_norm.shape)}")
    if not input_norm.isfinite().all():
        raise ValueError("input_norm is not finite: look for inf or nan in the calibration batch")
    if (input_norm < 0).any():
        raise ValueError("input_norm holds numbers below 0: pass the L2 norm of each input feature")
    score = weight.float().abs().mul_(input_norm.float())
    if not score.amax().isfinite():
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    return score


def wanda_mask(weight: Tensor, input_norm: Tensor, sparsity: float) -> Tensor:
    """Mark the weights of one linear layer that Wanda removes: the lowest scores of each output row.

    Only ranks within a row matter, so any common scale of input_norm gives the same mask.
    weight, input_norm   as `wanda_score`.
    sparsity             share of every row, 0 <= sparsity < 1, rounded down to whole weights; ties go by position.
    returns              (out, in) bool, True where the weight is to be zeroed.
    raises               ValueError as `wanda_score`, or on sparsity out of range.
    """
    return lowest_of_rows(wanda_score(weight, input_norm), sparsity)


def wanda_mask_n_of_m(weight: Tensor, input_norm: Tensor, kept: int, of: int) -> Tensor:
    """As `wanda_mask`, keeping the `kept` highest of every `of` neighbours in a row (§3, structured n:m)."""
    return all_but_highest(wanda_score(weight, input_norm), kept, of)
