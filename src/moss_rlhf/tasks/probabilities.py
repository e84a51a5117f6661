"""Several classifiers as one, by their probabilities, and what probabilities are worth."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Ids = NDArray[np.integer[Any]]


def log_mean_probability(logits: NDArray[np.floating[Any]]) -> Numbers:
    """Log of the mean over members of softmax(logits): what an ensemble says (Lakshminarayanan et al. 2017, §2.4).

    logits    (members, rows, classes), any float dtype; computed in float64, in logarithms, so that none becomes −∞.
    returns   (rows, classes) float64; its softmax is the mean of probabilities, so it serves as logits too.
    """
    wide = np.asarray(logits, dtype=np.float64)
    each = wide - _log_sum_exp(wide, axis=2)
    mean: Numbers = (_log_sum_exp(each, axis=0) - np.log(len(wide)))[0]
    return mean


def _log_sum_exp(values: Numbers, axis: int) -> Numbers:
    """With `axis` kept, of length 1."""
    highest = values.max(axis=axis, keepdims=True)
    result: Numbers = highest + np.log(np.exp(values - highest).sum(axis=axis, keepdims=True))
    return result


def mean_log_loss(log_probabilities: Numbers, labels: Ids) -> float:
    """Mean of −log p of the true class, in nats. log_probabilities (rows, classes), labels (rows,)."""
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def brier_score(log_probabilities: Numbers, labels: Ids) -> float:
    """Mean over rows of Σ_c (p_c − [c is the true class])²: 0 best, 2 worst (Brier 1950). Shapes as above."""
    probabilities = np.exp(log_probabilities)
    probabilities[np.arange(len(labels)), labels] -= 1
    return float((probabilities**2).sum(axis=1).mean())
