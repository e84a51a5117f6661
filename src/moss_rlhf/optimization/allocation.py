"""How much of each block goes, when not the same everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moss_rlhf.optimization.patterns import check_sparsity
from moss_rlhf.optimization.wanda import wanda_score


def outlier_ratio(weight: Tensor, input_norm: Tensor, threshold: float = 5.0) -> float:
    """Share of the weights whose |weight| · input norm is above `threshold` times the matrix's mean.

    Yin et al. 2023, arXiv:2310.05175, §3.2 (layer-wise outlier distribution, M = 5).
    weight (out, in); input_norm (in,). Raises ValueError as `wanda_score`.
    """
    score = wanda_score(weight, input_norm)
    return float((score > threshold * score.mean()).double().mean())


def sparsities_by_outliers(
    ratios: Sequence[float], sparsity: float, *, weights: Sequence[int], spread: float = 0.08
) -> list[float]:
    """Sparsities within `sparsity` ± `spread` that fall as the outlier ratio rises; their weighted mean is `sparsity`.

    Yin et al. 2023, §3.3: the ratios, scaled to a range of 2 · spread, are taken off, and the mean is put right.
    ratios    one a block; weights: how many weights each has.
    raises    ValueError where a share would leave [0, 1): give a smaller spread.
    """
    check_sparsity(sparsity)
    low, high = min(ratios), max(ratios)
    scaled = [2 * spread * (ratio - low) / (high - low) if high > low else 0.0 for ratio in ratios]
    mean = sum(one * size for one, size in zip(scaled, weights, strict=True)) / sum(weights)
    found = [sparsity + mean - one for one in scaled]
    if min(found) < 0 or max(found) >= 1:
        raise ValueError(f"spread {spread} around sparsity {sparsity} leaves [0, 1): give a smaller spread")
    return found
