"""A cheap classifier on embeddings, and what it says of rows that it has not seen. Needs scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]

_STRENGTH = 10.0  # inverse of the L2 penalty: vectors of length 1 need weights of some size
_STEPS = 1000


def probe_probabilities(
    train: Floats, labels: Indices, features: Floats, weights: Floats | None = None, strength: float = _STRENGTH
) -> NDArray[np.float64]:
    """Probabilities of a logistic regression for rows of features: (rows, classes up to the highest label).

    train, labels   (trained rows, size) and (trained rows,); a class without rows gets probability 0.
    weights         (trained rows,), how much each counts; default 1.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=strength, max_iter=_STEPS).fit(train, labels, sample_weight=weights)
    known = model.predict_proba(features)
    probabilities = np.zeros((len(features), int(labels.max()) + 1))
    probabilities[:, model.classes_] = known
    return probabilities


def probe_answers(train: Floats, labels: Indices, features: Floats) -> Indices:
    """Class ids, (rows,), of a logistic regression trained on embeddings."""
    answers: Indices = probe_probabilities(train, labels, features).argmax(axis=1)
    return answers


def stratified_folds(labels: Indices, folds: int, seed: int) -> Indices:
    """A fold for each row, 0 to folds − 1, every class dealt out evenly.

    raises   ValueError where a class has fewer rows than there are folds: in one it would be unknown.
    """
    places = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.random.default_rng([seed, int(label)]).permutation(np.flatnonzero(labels == label))
        if len(rows) < folds:
            raise ValueError(f"{folds} folds, but class {label} has {len(rows)} rows; each fold needs one")
        places[rows] = np.arange(len(rows)) % folds
    return places
