"""Votes of the nearest rows, against values worked by hand."""

import numpy as np
import pytest

from moss_rlhf.data.cleaning.label_errors import (
    fold_fault,
    nearest_rows,
    neighbour_shares,
    suspicious_labels,
    unsupported,
)
from moss_rlhf.data.cleaning.probe import stratified_folds


def test_the_nearest_are_other_rows_and_weigh_by_the_fourth_power():
    angles = np.radians([0, 30, 60, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    nearest, weights = nearest_rows(vectors, 2)
    assert sorted(nearest[0].tolist()) == [1, 2]
    by_row = dict(zip(nearest[0].tolist(), weights[0].tolist(), strict=True))
    assert by_row[1] == pytest.approx((3 / 4) ** 2)  # cos 30° squared is 3/4
    assert by_row[2] == pytest.approx(1 / 16)
    assert weights[3].min() == 0  # what points away has no vote


def test_chunks_change_nothing(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(30, 5))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    whole = nearest_rows(vectors, 4)
    monkeypatch.setattr("moss_rlhf.data.cleaning.label_errors._CHUNK_NUMBERS", 70)
    for one, other in zip(whole, nearest_rows(vectors, 4), strict=True):
        np.testing.assert_allclose(np.sort(one, axis=1), np.sort(other, axis=1))


def test_a_row_that_is_contradicted_loses_its_vote():
    """Nine alike, one of them with another label: at first it takes an eighth of each vote, in the end nothing."""
    vectors, classes = np.tile([1.0, 0.0], (9, 1)), np.array([0] * 8 + [1])
    shares = neighbour_shares(vectors, classes)
    np.testing.assert_allclose(shares[8], [1, 0], atol=1e-9)
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert shares[:8, 0].min() == pytest.approx(1)


def test_support_is_measured_against_what_the_class_usually_has():
    # class 0 usually has 0.9, class 1 usually 0.4: 0.5 is little for the one and much for the other
    shares = np.array([[0.95, 0.05], [0.95, 0.05], [0.95, 0.05], [0.75, 0.25], [0.5, 0.5], [0.6, 0.4], [0.7, 0.3]])
    classes = np.array([0, 0, 0, 0, 1, 1, 1])
    assert unsupported(shares, classes, 0.85).tolist() == [False, False, False, True, False, False, True]


def test_the_reason_names_the_other_label_and_equal_seeds_agree():
    generator = np.random.default_rng(1)
    vectors = np.concatenate([generator.normal(size=(30, 4)) + 2, generator.normal(size=(30, 4)) - 2])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = ["up"] * 30 + ["down"] * 30
    labels[7] = "down"
    (hit,) = suspicious_labels(vectors, labels)
    assert hit.row == 7
    assert hit.reason.startswith("other rows say 'up' (1.00), for 'down' speaks 0.0")


def test_folds_deal_every_class_out_evenly():
    labels = np.array([0] * 10 + [1] * 7)
    folds = stratified_folds(labels, 3, seed=0)
    assert np.bincount(folds[:10]).tolist() == [4, 3, 3]
    assert np.bincount(folds[10:17]).tolist() == [3, 2, 2]
    assert folds.tolist() != stratified_folds(labels, 3, seed=1).tolist()
    with pytest.raises(ValueError, match="8 folds, but class 1 has 7 rows"):
        stratified_folds(labels, 8, seed=0)


def test_a_class_of_fewer_rows_than_folds_has_words():
    assert fold_fault({"a": 5, "b": 90, "gone": 0}, 5) is None
    assert fold_fault({"a": 4, "b": 3}, 5) == (
        "folds: 5, but train has only 3 of the class 'b', and each fold needs one. "
        "Give folds: 3, or label_method: neighbours."
    )
    assert fold_fault({"a": 1}, 2) == (
        "folds: 2, but train has only 1 of the class 'a', and each fold needs one. Give label_method: neighbours."
    )
