"""Whether a classifier's probabilities can be believed: log loss, calibration error, the temperature that mends it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.tasks.metrics import Classes, class_ids
from moss_rlhf.tasks.row_statistics import RowStatistics

Numbers = NDArray[np.float64]
Logits = NDArray[np.floating[Any]] | Sequence[Sequence[float]]

BINS = 15
TEMPERATURES = (0.05, 20.0)
"""Between these a temperature is looked for."""


def log_probabilities(logits: Logits, temperature: float = 1.0) -> Numbers:
    """Log softmax(logits / temperature) in float64: (rows, classes) → (rows, classes)."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    result: Numbers = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def probability_statistics(logits: Logits, labels: Classes, temperature: float = 1.0) -> RowStatistics:
    """What each row adds to the metrics of probabilities: (2 + BINS,) numbers, of which three are not zero.

    −log p of the true class; 1, the row itself; and confidence − correct in the bin of the row's confidence, which is
    its largest probability: bin m holds ((m − 1) / BINS, m / BINS] (Guo et al. 2017, arXiv:1706.04599, §2).
    raises   ValueError on no rows, unequal lengths, or a label out of range.
    """
    found = log_probabilities(logits, temperature)
    (truth,) = class_ids(found.shape[1], labels=labels)
    confidence, correct = np.exp(found.max(axis=1)), found.argmax(axis=1) == truth
    rows = np.arange(len(truth))
    columns = np.stack([np.zeros_like(rows), np.ones_like(rows), 2 + _bins(confidence)], axis=1)
    values = np.stack([-found[rows, truth], np.ones(len(rows)), confidence - correct], axis=1)
    return RowStatistics(columns, values, (2 + BINS,))


def _bins(confidence: Numbers) -> NDArray[np.int64]:
    bins: NDArray[np.int64] = (np.ceil(confidence * BINS).astype(np.int64) - 1).clip(0, BINS - 1)
    return bins


def log_loss(sums: Numbers) -> Numbers:
    """Mean −log p of the true class, in nats: (…, 2 + BINS) sums of row statistics → (…)."""
    value: Numbers = sums[..., 0] / sums[..., 1]
    return value


def expected_calibration_error(sums: Numbers) -> Numbers:
    """Σ_bins |Σ (confidence − correct)| / rows (Guo et al. 2017, eq. 3): (…, 2 + BINS) → (…), 0 to 1."""
    value: Numbers = np.abs(sums[..., 2:]).sum(axis=-1) / sums[..., 1]
    return value


def reliability(logits: Logits, labels: Classes, temperature: float = 1.0) -> list[dict[str, float]]:
    """The bins that hold rows, by rising confidence: {"rows", "confidence": their mean, "accuracy": share right}."""
    found = log_probabilities(logits, temperature)
    (truth,) = class_ids(found.shape[1], labels=labels)
    confidence, correct = np.exp(found.max(axis=1)), found.argmax(axis=1) == truth
    bins = _bins(confidence)
    inside = [bins == number for number in np.unique(bins)]
    return [
        {"rows": int(part.sum()), "confidence": float(confidence[part].mean()), "accuracy": float(correct[part].mean())}
        for part in inside
    ]


def fit_temperature(logits: Logits, labels: Classes) -> float:
    """The T that makes the mean −log softmax(logits / T) of the true classes least (Guo et al. 2017, §4.2).

    The loss is convex in 1 / T. Where every row is right it falls for ever as T goes to 0, and 1.0 is returned: such
    rows say nothing of how sure to be. Looked for within TEMPERATURES.
    raises   ValueError on no rows, unequal lengths, or a label out of range.
    """
    from scipy.optimize import minimize_scalar

    values = np.asarray(logits, dtype=np.float64)
    (truth,) = class_ids(values.shape[1], labels=labels)
    own = values[np.arange(len(truth)), truth]
    if (own >= values.max(axis=1)).all():
        return 1.0

    def loss(logarithm: float) -> float:
        found = log_probabilities(values, float(np.exp(logarithm)))
        return -float(found[np.arange(len(truth)), truth].mean())

    ends = (float(np.log(TEMPERATURES[0])), float(np.log(TEMPERATURES[1])))
    return float(np.exp(minimize_scalar(loss, bounds=ends, method="bounded", options={"xatol": 1e-6}).x))
