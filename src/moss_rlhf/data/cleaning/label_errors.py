"""Labels that the other rows contradict, by embeddings: of the nearest rows, or by confident learning.

Neighbours (the default). A row's own label should be that of most texts like it. Of its k nearest rows by cosine s,
each votes for its label with weight s⁴ · trust; the share of the row's own label is its support, and is its trust in
the next round, so rows that are contradicted themselves lose their vote. A label is suspicious where its support is
below 0.85 of what rows of its label have on average: a threshold for each class, as in confident learning, for some
classes are harder than others. No row votes for itself, so no folds are needed.

Confident learning (Northcutt et al. 2021, arXiv:1911.00068) through cleanlab: a logistic regression gives every row
probabilities from folds that it was not trained on, and the counts of confident disagreements say how many labels of
each class are wrong; the least likely go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.cleaning.finding import Hit
from moss_rlhf.data.cleaning.probe import Floats, Indices, probe_probabilities, stratified_folds

Method = Literal["neighbours", "confident"]

_NEIGHBOURS = 50
_SHARE_OF_CLASS = (
    8  # a class of n rows is judged by at most n / 8 neighbours, or small classes would always be outvoted
)
_ROUNDS = 4
_POWER = 4
SUPPORT = 0.85
"""Measured on annotators' labels of news (docs/clean.md): from 0.7 to 0.9 precision falls from 0.67 to 0.60, and recall
rises from 0.53 to 0.64."""
_CHUNK_NUMBERS = 2**24


def suspicious_labels(
    vectors: Floats,
    labels: Sequence[str],
    *,
    method: Method = "neighbours",
    support: float = SUPPORT,
    folds: int = 5,
    seed: int = 0,
) -> list[Hit]:
    """Rows whose label is contradicted; the reason says by which label and how much.

    vectors   (rows, size), of length 1.
    support   of neighbours: a label is suspicious below this part of its class's usual support.
    folds     of confident learning; every class has as many rows at least, see `fold_fault`.
    """
    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    if method == "confident":
        shares = out_of_fold(vectors, classes, folds, seed)
        suspicious = confident_errors(shares, classes)
    else:
        shares = neighbour_shares(vectors, classes)
        suspicious = unsupported(shares, classes, support)
    return [Hit(int(row), _reason(shares[row], names, classes[row])) for row in np.flatnonzero(suspicious)]


def fold_fault(classes: Mapping[str, int], folds: int) -> str | None:
    """Why confident learning can't judge these rows, as the field and a sentence, else None.

    classes   {label: rows of train}; a label without rows does not matter.
    """
    rare = {label: count for label, count in classes.items() if 0 < count < folds}
    if not rare:
        return None
    label, count = min(rare.items(), key=lambda pair: pair[1])
    remedy = f"folds: {count}, or " * (count > 1) + "label_method: neighbours"
    return f"folds: {folds}, but train has only {count} of the class {label!r}, and each fold needs one. Give {remedy}."


def _reason(shares: Floats, names: NDArray[np.str_], label: int) -> str:
    others = np.where(np.arange(len(names)) == label, -1.0, shares)
    best = int(others.argmax())
    said, given = str(names[best]), str(names[label])
    return f"other rows say {said!r} ({shares[best]:.2f}), for {given!r} speaks {shares[label]:.2f}"


# --- neighbours ------------------------------------------------------------------------------------------------------


def neighbour_shares(vectors: Floats, classes: Indices) -> NDArray[np.float64]:
    """The trusted share of each class among the nearest rows, (rows, classes); rows sum to 1.

    vectors   (rows, size), of length 1;  classes  (rows,), 0 to classes − 1.
    """
    count = min(_NEIGHBOURS, max(1, int(np.bincount(classes).max()) // _SHARE_OF_CLASS), len(classes) - 1)
    nearest, weights = nearest_rows(vectors, count)
    votes = np.eye(int(classes.max()) + 1)[classes]
    rows, trust = np.arange(len(classes)), np.ones(len(classes))
    shares: NDArray[np.float64] = votes
    for _ in range(_ROUNDS):
        trusted = weights * trust[nearest]
        shares = np.einsum("rn,rnc->rc", trusted, votes[nearest]) + 1e-12
        shares /= shares.sum(axis=1, keepdims=True)
        trust = shares[rows, classes]
    return shares


def nearest_rows(vectors: Floats, count: int) -> tuple[Indices, NDArray[np.float64]]:
    """The `count` nearest other rows of each by cosine, and their weights max(s, 0)⁴: (rows, count) each."""
    nearest = np.empty((len(vectors), count), dtype=np.int64)
    weights = np.empty((len(vectors), count))
    step = max(1, _CHUNK_NUMBERS // len(vectors))
    for start in range(0, len(vectors), step):
        likeness = vectors[start : start + step] @ vectors.T
        own = np.arange(len(likeness))
        likeness[own, start + own] = -np.inf
        found = np.argpartition(-likeness, count - 1, axis=1)[:, :count]
        nearest[start : start + step] = found
        weights[start : start + step] = np.maximum(np.take_along_axis(likeness, found, axis=1), 0.0) ** _POWER
    return nearest, weights


def unsupported(shares: Floats, classes: Indices, support: float) -> NDArray[np.bool_]:
    """Rows, (rows,), whose own class has less than `support` × its average share where it is the label."""
    own = shares[np.arange(len(classes)), classes]
    usual = np.bincount(classes, weights=own) / np.bincount(classes)
    below: NDArray[np.bool_] = own < support * usual[classes]
    return below


# --- confident learning ----------------------------------------------------------------------------------------------


def out_of_fold(vectors: Floats, classes: Indices, folds: int, seed: int) -> NDArray[np.float64]:
    """Probabilities, (rows, classes), each row's by a logistic regression trained on the other folds."""
    places = stratified_folds(classes, folds, seed)
    probabilities = np.zeros((len(classes), int(classes.max()) + 1))
    for fold in range(folds):
        held = places == fold
        probabilities[held] = probe_probabilities(vectors[~held], classes[~held], vectors[held])
    return probabilities


def confident_errors(probabilities: Floats, classes: Indices) -> NDArray[np.bool_]:
    """Rows, (rows,), that cleanlab's `find_label_issues` names, pruned by noise rate."""
    from cleanlab.filter import find_label_issues

    errors: NDArray[np.bool_] = find_label_issues(classes, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    return errors
