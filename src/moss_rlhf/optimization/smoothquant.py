"""SmoothQuant: move the outliers of activations into the weights, where a grid bears them better.

Xiao et al. 2022, arXiv:2211.10438. A linear layer computes X Wᵀ = (X / s) (W · s)ᵀ for any s > 0, one an input feature.
W · s is written into the matrices; X / s costs nothing where it is written into what makes X: a norm's weight and bias,
or the rows of the matrix before. The outputs stay the same; only the ranges change.

X must go nowhere else. In pre-norm blocks (GPT-2, OPT, llama, T5 …) it doesn't; in post-norm ones (BERT, BART, Marian)
the norm's output is the residual as well, and folding a scale into it would change the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def smoothing_scales(activation_maximum: Tensor, weight_maximum: Tensor, alpha: float = 0.5) -> Tensor:
    """Scales max|X|^α / max|W|^(1−α), one an input feature (Xiao et al. 2022, arXiv:2211.10438, eq. 4).

    activation_maximum   (in,), the largest |x| of each input feature over the calibration tokens.
    weight_maximum       (in,), the largest |w| of each input feature over all matrices that read it.
    alpha                how much moves into the weights: 0 evens out the weights, 1 the activations.
    returns              (in,), > 0, at least float32; 1 for a feature whose activations or weights are all 0.
    raises               ValueError on shapes that differ, maxima that are negative, inf or nan, alpha outside [0, 1].
    """
    if activation_maximum.shape != weight_maximum.shape or activation_maximum.dim() != 1:
        raise ValueError(
            f"activation_maximum and weight_maximum must both be (in,), got {tuple(activation_maximum.shape)} "
            f"and {tuple(weight_maximum.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    for name, value in (("activation_maximum", activation_maximum), ("weight_maximum", weight_maximum)):
        if not value.isfinite().all() or (value < 0).any():
            raise ValueError(f"{name} must be finite and >= 0: look for inf or nan in the checkpoint and the batch")
    dtype = torch.promote_types(activation_maximum.dtype, torch.float32)
    activations, weights = activation_maximum.to(dtype), weight_maximum.to(dtype)
    scales = activations**alpha / weights ** (1 - alpha)
    return torch.where((activations > 0) & (weights > 0) & (scales > 0) & scales.isfinite(), scales, 1)


def fold_scales(
    scales: Tensor, weight: Tensor, bias: Tensor | None, followers: Sequence[Tensor], *, unit_offset: bool = False
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Divide what makes the activations by `scales` and multiply the matrices that read them: the same function.

    Nothing is changed in place, and everything is computed in float64 and returned in the dtype it came in.

    scales        (in,), > 0, finite.
    weight        of the maker: (in,) for LayerNorm and RMSNorm; (in, before) for a matrix with nothing but
                  a product after it (up before down in a gated feed-forward, v before o).
    bias          (in,) of the maker, or None.
    followers     (out, in) each: all that read the activations.
    unit_offset   the maker multiplies by 1 + weight (gemma's norm).
    returns       (weight, bias, followers).
    raises        ValueError on shapes that do not fit, or scales that are not positive and finite.
    """
    _check(scales, weight, bias, followers, unit_offset)
    s = scales.double()
    offset = 1.0 if unit_offset else 0.0
    made = (weight.double() + offset) / (s if weight.dim() == 1 else s[:, None]) - offset
    read = [(follower.double() * s).to(follower.dtype) for follower in followers]
    return made.to(weight.dtype), None if bias is None else (bias.double() / s).to(bias.dtype), read


def _check(scales: Tensor, weight: Tensor, bias: Tensor | None, followers: Sequence[Tensor], unit_offset: bool) -> None:
    if scales.dim() != 1 or not scales.isfinite().all() or not (scales > 0).all():
        raise ValueError(f"scales must be (in,), finite and > 0, got {tuple(scales.shape)} from {scales.min():g} up")
    width = len(scales)
    if weight.dim() not in (1, 2) or len(weight) != width or (bias is not None and bias.shape != scales.shape):
        found = None if bias is None else tuple(bias.shape)
        raise ValueError(
            f"{width} scales fit a maker of {width} features, got weight {tuple(weight.shape)} and bias {found}"
        )
    if unit_offset and weight.dim() != 1:
        raise ValueError(f"unit_offset is for the weight of a norm, ({width},), got {tuple(weight.shape)}")
    for follower in followers:
        if follower.dim() != 2 or follower.shape[1] != width:
            raise ValueError(f"{width} scales fit matrices (out, {width}), got {tuple(follower.shape)}")
