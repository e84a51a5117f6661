"""How much of each block goes, when not the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moss_rlhf.optimization.patterns import check_sparsity
from moss_rlhf.optimization.wanda import wanda_score
from moss_rlhf.recipe.compression import OUTLIER_SPREAD


def outlier_ratio(weight: Tensor, input_norm: Tensor, threshold: float = 5.0) -> float:
    """Share of the weights whose |weight| · input norm is above `threshold` times the matrix's mean.

    Yin et al. 2023, arXiv:2310.05175, §3.2 (layer-wise outlier distribution, M = 5). Scale-free in both arguments.
    weight (out, in); input_norm (in,). Raises ValueError as `wanda_score`, or where threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be above 0 times the mean, got {threshold}")
    score = wanda_score(weight, input_norm)
    return int((score > threshold * score.mean()).sum()) / score.numel()


def sparsities_by_outliers(
    ratios: Sequence[float], sparsity: float, *, weights: Sequence[int], spread: float = OUTLIER_SPREAD
) -> list[float]:
    """Sparsities within `sparsity` ± `spread` that fall as the outlier ratio rises; their weighted mean is `sparsity`.

    s_i = sparsity − spread · (r_i − r̄) / max_k |r_k − r̄|, r̄ the weighted mean ratio (Yin et al. 2023, §3.3: s_i ∝ 1 −
    r_i within S ± λ, λ = 0.08). The published code scales the ratios to a range of 2λ and puts the mean right
    afterwards, which takes a single block of many outliers up to 2λ away from S; here λ is kept.
    ratios    one a block; weights: how many weights each has.
    raises    ValueError where a share could leave [0, 1), the spread is below 0, or the lists don't fit.
    """
    check_sparsity(sparsity)
    if not ratios or len(ratios) != len(weights) or min(weights) <= 0:
        raise ValueError(f"one outlier ratio and one number of weights a block, got {len(ratios)} and {len(weights)}")
    if spread < 0 or sparsity - spread < 0 or sparsity + spread >= 1:
        raise ValueError(f"spread {spread} around sparsity {sparsity} leaves [0, 1): give a smaller spread, 0 or above")
    mean = sum(ratio * size for ratio, size in zip(ratios, weights, strict=True)) / sum(weights)
    farthest = max(abs(ratio - mean) for ratio in ratios)
    if farthest <= 1e-12:
        return [sparsity] * len(ratios)
    return [sparsity - spread * (ratio - mean) / farthest for ratio in ratios]
