"""Log loss, calibration error and temperature, by hand and in closed form."""

import math

import numpy as np
import pytest

from moss_rlhf.evaluation import bootstrap
from moss_rlhf.tasks.calibration import (
    BINS,
    expected_calibration_error,
    fit_temperature,
    log_loss,
    log_probabilities,
    probability_statistics,
    reliability,
)


def logits_of(*probabilities):
    """Two classes; the probability of the second."""
    return [[math.log(1 - probability), math.log(probability)] for probability in probabilities]


def test_log_loss_by_hand():
    """Probabilities of the truth 0.8, 0.4 and 0.5."""
    sums = probability_statistics(logits_of(0.8, 0.6, 0.5), [1, 0, 1]).summed()
    assert log_loss(sums) == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.5)) / 3)


def test_calibration_error_by_hand():
    """Bins of 1/15: 0.9 and 0.88 in (13/15, 14/15], 0.6 alone in (8/15, 9/15], 0.7 of class 0 in (10/15, 11/15].

    One of the two in the first is right: |0.9 + 0.88 − 1| = 0.78; 0.6 is wrong: 0.6; 0.7 is right: 0.3. Over 4 rows.
    """
    logits, labels = logits_of(0.9, 0.88, 0.6, 0.3), [1, 0, 0, 0]
    assert expected_calibration_error(probability_statistics(logits, labels).summed()) == pytest.approx(1.68 / 4)
    bins = reliability(logits, labels)
    assert [part["rows"] for part in bins] == [1, 1, 2]
    assert [part["confidence"] for part in bins] == pytest.approx([0.6, 0.7, 0.89])
    assert [part["accuracy"] for part in bins] == [0, 1, 0.5]


def test_right_and_wrong_rows_make_up_for_each_other_in_a_bin():
    logits = logits_of(*[0.8] * 10)
    assert expected_calibration_error(probability_statistics(logits, [1] * 8 + [0] * 2).summed()) == pytest.approx(0)
    assert expected_calibration_error(probability_statistics(logits, [1] * 10).summed()) == pytest.approx(0.2)


def test_metrics_agree_with_a_loop_over_bins():
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(500, 4)) * 2, generator.integers(0, 4, 500)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    error = 0.0
    for number in range(BINS):
        inside = (confidence > number / BINS) & (confidence <= (number + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    sums = probability_statistics(logits, labels).summed()
    assert expected_calibration_error(sums) == pytest.approx(error)
    assert log_loss(sums) == pytest.approx(-np.log(probabilities[np.arange(500), labels]).mean())


def test_the_interval_of_log_loss_is_that_of_a_mean():
    generator = np.random.default_rng(1)
    logits, labels = generator.normal(size=(400, 2)), generator.integers(0, 2, 400)
    losses = -log_probabilities(logits)[np.arange(400), labels]
    rows = probability_statistics(logits, labels)
    found = bootstrap(rows, metrics={"loss": log_loss}, confidence=0.95, resamples=2000, seed=0)["loss"]
    half = 1.96 * losses.std() / 20
    assert found["low"] == pytest.approx(losses.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(losses.mean() + half, abs=0.1 * half)


def test_the_temperature_of_one_confidence_is_known():
    """Gap of logits g, share s right: the best T gives σ(g / T) = s, so T = g / ln(s / (1 − s))."""
    logits, labels = [[0.0, 4.0]] * 10, [1] * 8 + [0] * 2
    assert fit_temperature(logits, labels) == pytest.approx(4 / math.log(4), rel=1e-4)


def test_logits_that_were_scaled_are_scaled_back():
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(3000, 3)) * 2
    chances = np.exp(log_probabilities(logits)).cumsum(axis=1)
    labels = (generator.random((3000, 1)) > chances).sum(axis=1)
    alone = fit_temperature(logits, labels)
    assert alone == pytest.approx(1, abs=0.08)
    assert fit_temperature(2.5 * logits, labels) == pytest.approx(2.5 * alone, rel=1e-4)
    before, after = (probability_statistics(2.5 * logits, labels, t).summed() for t in (1.0, 2.5 * alone))
    assert log_loss(after) < log_loss(before)
    assert expected_calibration_error(after) < 0.03 < expected_calibration_error(before)


def test_where_all_rows_are_right_nothing_is_scaled():
    assert fit_temperature([[0.0, 1.0], [2.0, 0.0]], [1, 0]) == 1.0


def test_large_logits_stay_finite():
    sums = probability_statistics([[0.0, 5000.0]], [0]).summed()
    assert log_loss(sums) == 5000


@pytest.mark.parametrize(("labels", "fault"), [([], "at least one row"), ([2, 0], "labels must be in 0 … 1")])
def test_rows_that_make_no_sense_are_refused(labels, fault):
    with pytest.raises(ValueError, match=fault):
        probability_statistics(np.zeros((len(labels), 2)) if labels else np.zeros((1, 2))[:0], labels)
