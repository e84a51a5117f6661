import math
from functools import partial

import numpy as np
import pytest

from moss_rlhf.evaluation import bootstrap, paired_difference
from moss_rlhf.tasks.language import perplexity, token_accuracy
from moss_rlhf.tasks.metrics import accuracy, confusion, macro_f1
from moss_rlhf.tasks.row_statistics import RowStatistics, confusion_cells, written_out

USUAL = {"confidence": 0.95, "resamples": 2000, "seed": 0}


def two_class(right: int, wrong: int) -> tuple[list[int], list[int]]:
    """Labels all 0; so many predicted right, so many wrong."""
    return [0] * (right + wrong), [0] * right + [1] * wrong


def discordant(lost: int, gained: int, both: int) -> tuple[list[int], list[int], list[int]]:
    """Labels all 1; rows only the first model has right, only the second, and both."""
    before = [1] * lost + [0] * gained + [1] * both
    after = [0] * lost + [1] * gained + [1] * both
    return [1] * len(before), before, after


def noisy(seed: int, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and two models that are right on most rows, each with its own mistakes."""
    generator = np.random.default_rng(seed)
    labels, other, third = generator.integers(0, classes, (3, rows))
    before = np.where(generator.random(rows) < 0.7, labels, other)
    after = np.where(generator.random(rows) < 0.75, labels, third)
    return labels, before, after


def difference_of(labels, before, after, classes: int, **settings) -> dict[str, float]:
    """`paired_difference` of two classifiers on the same rows."""
    return paired_difference(*(confusion_cells(labels, ids, classes) for ids in (before, after)), **settings)


def test_confusion_has_the_truth_in_rows() -> None:
    assert confusion([0, 0, 1, 2], [0, 2, 1, 1], 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]


def test_metrics_by_hand() -> None:
    """F1: class 0: 2/(2+1) = 2/3; class 1: 2/(2+1) = 2/3; class 2: 0/(0+2) = 0; class 3 occurs nowhere."""
    matrix = confusion([0, 0, 1, 2], [0, 2, 1, 1], 4)
    assert accuracy(matrix) == pytest.approx(1 / 2)
    assert macro_f1(matrix) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)


def test_metrics_of_a_stack_are_those_of_each() -> None:
    stack = np.random.default_rng(0).integers(0, 5, (2, 3, 5, 5))
    for metric in (accuracy, macro_f1):
        alone = [[metric(matrix) for matrix in row] for row in stack]
        np.testing.assert_array_equal(metric(stack), alone)


def test_macro_f1_is_scikit_learns() -> None:
    reference = pytest.importorskip("sklearn.metrics").f1_score
    for seed in range(20):
        generator = np.random.default_rng(seed)
        labels, predictions = generator.integers(0, 7, (2, 11))
        ours = macro_f1(confusion(labels, predictions, 7))
        with_absent = reference(labels, predictions, average="macro", labels=range(7), zero_division=np.nan)
        assert ours == pytest.approx(reference(labels, predictions, average="macro"), abs=1e-12)
        assert ours == pytest.approx(with_absent, abs=1e-12)


def test_interval_of_accuracy_is_the_normal_approximation() -> None:
    estimate = bootstrap(confusion_cells(*two_class(1600, 400), 2), metrics={"accuracy": accuracy}, **USUAL)["accuracy"]
    half = 1.96 * math.sqrt(0.8 * 0.2 / 2000)
    assert estimate["value"] == pytest.approx(0.8)
    assert estimate["low"] == pytest.approx(0.8 - half, abs=0.1 * half)
    assert estimate["high"] == pytest.approx(0.8 + half, abs=0.1 * half)


def test_more_confidence_is_a_wider_interval() -> None:
    labels, predictions = two_class(80, 20)
    widths = []
    for confidence in (0.8, 0.95, 0.99):
        estimate = bootstrap(
            confusion_cells(labels, predictions, 2),
            metrics={"a": accuracy},
            confidence=confidence,
            resamples=2000,
            seed=0,
        )["a"]
        widths.append(estimate["high"] - estimate["low"])
    assert widths == sorted(widths)
    assert widths[0] == pytest.approx(2 * 1.2816 * 0.04, rel=0.15)


def test_drawing_counts_is_drawing_rows() -> None:
    """The interval agrees with the bootstrap that draws row numbers, one resample at a time."""
    labels, predictions, _ = noisy(1, 150, 5)
    estimate = bootstrap(confusion_cells(labels, predictions, 5), metrics={"f1": macro_f1}, **USUAL)["f1"]
    generator = np.random.default_rng(7)
    chosen = (generator.integers(0, 150, 150) for _ in range(2000))
    draws = [macro_f1(confusion(labels[rows], predictions[rows], 5)) for rows in chosen]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert estimate["low"] == pytest.approx(low, abs=0.01)
    assert estimate["high"] == pytest.approx(high, abs=0.01)


def test_95_percent_intervals_cover_the_truth_95_times_in_100() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for seed, right in enumerate(generator.binomial(300, 0.8, size=600)):
        labels, predictions = two_class(int(right), 300 - int(right))
        estimate = bootstrap(
            confusion_cells(labels, predictions, 2), metrics={"a": accuracy}, confidence=0.95, resamples=500, seed=seed
        )["a"]
        covered += estimate["low"] <= 0.8 <= estimate["high"]
    assert 0.92 <= covered / 600 <= 0.98


def test_chunks_do_not_change_the_result(monkeypatch) -> None:
    labels, before, after = noisy(2, 200, 4)
    whole = difference_of(labels, before, after, 4, metric=macro_f1, **USUAL)
    alone = bootstrap(confusion_cells(labels, before, 4), metrics={"f1": macro_f1}, **USUAL)
    monkeypatch.setattr("moss_rlhf.evaluation.statistics._CHUNK_NUMBERS", 1000)
    assert difference_of(labels, before, after, 4, metric=macro_f1, **USUAL) == whole
    assert bootstrap(confusion_cells(labels, before, 4), metrics={"f1": macro_f1}, **USUAL) == alone


def test_the_seed_decides() -> None:
    labels, before, after = noisy(3, 100, 3)
    results = [
        difference_of(labels, before, after, 3, metric=macro_f1, confidence=0.95, resamples=300, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert results[0] == results[1] != results[2]


def test_mcnemar_by_hand() -> None:
    """2 rows lost, 8 gained: p = 2 · (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112/1024."""
    difference = difference_of(*discordant(2, 8, 90), 2, metric=accuracy, **USUAL)
    assert difference["delta"] == pytest.approx(0.06)
    assert difference["p_value"] == pytest.approx(112 / 1024)


def test_random_swaps_agree_with_the_exact_test_of_accuracy() -> None:
    labels, before, after = discordant(12, 25, 100)
    exact = difference_of(labels, before, after, 2, metric=accuracy, **USUAL)
    many = {**USUAL, "resamples": 20_000}
    swaps = difference_of(labels, before, after, 2, metric=partial(accuracy), **many)  # no longer `accuracy` itself
    assert 0.03 < exact["p_value"] < 0.06
    assert swaps["p_value"] == pytest.approx(exact["p_value"], abs=0.005)


def test_swaps_of_f1_agree_with_swapping_row_by_row() -> None:
    labels, before, after = noisy(4, 60, 3)
    ours = difference_of(labels, before, after, 3, metric=macro_f1, **USUAL)
    generator = np.random.default_rng(9)

    def moved(swap: np.ndarray) -> float:
        first, second = np.where(swap, after, before), np.where(swap, before, after)
        return abs(float(macro_f1(confusion(labels, second, 3)) - macro_f1(confusion(labels, first, 3))))

    observed = moved(np.zeros(60, dtype=bool))
    draws = np.array([moved(generator.random(60) < 0.5) for _ in range(2000)])
    assert ours["p_value"] == pytest.approx((draws >= observed - 1e-12).mean(), abs=0.05)


def test_the_paired_interval_is_that_of_the_per_row_difference() -> None:
    """delta of accuracy is a mean of −1, 0, 1: its standard error is known, and far below that of unpaired rows."""
    difference = difference_of(*discordant(30, 50, 920), 2, metric=accuracy, **USUAL)
    half = 1.96 * math.sqrt((0.08 - 0.02**2) / 1000)
    assert difference["low"] == pytest.approx(0.02 - half, abs=0.1 * half)
    assert difference["high"] == pytest.approx(0.02 + half, abs=0.1 * half)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_the_same_predictions_are_no_difference(metric) -> None:
    labels, before, _ = noisy(6, 80, 4)
    difference = difference_of(labels, before, before, 4, metric=metric, **USUAL)
    assert difference == {"delta": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
def test_exchanging_the_models_turns_the_sign(metric) -> None:
    labels, before, after = noisy(8, 300, 4)
    there = difference_of(labels, before, after, 4, metric=metric, **USUAL)
    back = difference_of(labels, after, before, 4, metric=metric, **USUAL)
    assert there["delta"] == pytest.approx(-back["delta"])
    assert there["low"] == pytest.approx(-back["high"], abs=0.02)
    assert there["p_value"] == pytest.approx(back["p_value"], abs=0.05)


@pytest.mark.parametrize(
    ("labels", "predictions", "fault"),
    [
        ([], [], "at least one row"),
        ([0, 1], [0], "equally long"),
        ([0, 3], [0, 1], "labels must be in 0 … 2, got 0 … 3"),
    ],
)
def test_rows_that_make_no_sense_are_refused(labels: list[int], predictions: list[int], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        confusion(labels, predictions, 3)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
        bootstrap(confusion_cells([0], [0], 2), metrics={}, confidence=95, resamples=10, seed=0)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        bootstrap(confusion_cells([0], [0], 2), metrics={}, confidence=0.95, resamples=0, seed=0)


# --- the same numbers as before rows had statistics of their own ----------------------------------------------------


def test_intervals_and_p_values_of_classification_are_what_they_always_were() -> None:
    """Drawn by the same generator from the same kinds of rows in the same order: equal to the last bit."""
    labels, before, after = noisy(11, 200, 4)
    usual = {**USUAL, "seed": 3}
    metrics = {"accuracy": accuracy, "macro_f1": macro_f1}
    assert bootstrap(confusion_cells(labels, before, 4), metrics=metrics, **usual) == {
        "accuracy": {"value": 0.78, "low": 0.72, "high": 0.8351249999999992},
        "macro_f1": {"value": 0.777353122391002, "low": 0.7168022789254181, "high": 0.8330355849926969},
    }
    assert difference_of(labels, before, after, 4, metric=accuracy, **usual) == {
        "delta": 0.09499999999999997,
        "low": 0.015000000000000013,
        "high": 0.16512499999999936,
        "p_value": 0.0204147137996349,
    }
    assert difference_of(labels, before, after, 4, metric=macro_f1, **usual) == {
        "delta": 0.09553399286299158,
        "low": 0.01874547316288508,
        "high": 0.16869766894970556,
        "p_value": 0.01199400299850075,
    }


# --- language models: (Σ −log p, target tokens, right tokens) a row ---------------------------------------------------


def scored(seed: int, rows: int, loss: float = 3.0) -> RowStatistics:
    """Rows of 5 to 60 tokens, each with its own mean loss around `loss`."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(5, 61, rows)
    losses = tokens * generator.normal(loss, 0.3, rows)
    return written_out(np.stack([losses, tokens, generator.binomial(tokens, 0.4)], axis=1))


def test_perplexity_by_hand() -> None:
    """3 tokens of probability 1/2 and 1 of 1/8: exp(6 · ln 2 / 4) = 2^1.5; the mean of the rows' own would be 5."""
    rows = written_out(np.array([[3 * math.log(2), 3, 2], [math.log(8), 1, 0]]))
    found = bootstrap(rows, metrics={"perplexity": perplexity, "right": token_accuracy}, **USUAL)
    assert found["perplexity"]["value"] == pytest.approx(2**1.5)
    assert found["right"]["value"] == 0.5
    # of two rows, resamples hold the first twice, both, or the second twice
    assert (found["perplexity"]["low"], found["perplexity"]["high"]) == (pytest.approx(2), pytest.approx(8))


def test_the_interval_of_perplexity_agrees_with_drawing_row_numbers() -> None:
    rows = scored(1, 150)
    found = bootstrap(rows, metrics={"perplexity": perplexity}, **USUAL)["perplexity"]
    generator = np.random.default_rng(7)
    draws = [perplexity(rows.values[generator.integers(0, 150, 150)].sum(axis=0)) for _ in range(2000)]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found["low"] == pytest.approx(low, rel=0.01)
    assert found["high"] == pytest.approx(high, rel=0.01)


def test_swaps_of_perplexity_agree_with_all_swaps_there_are() -> None:
    """8 rows: 256 ways to swap, each as likely."""
    before, after = scored(2, 8), scored(3, 8)
    after = written_out(np.column_stack([after.values[:, 0], before.values[:, 1:]]))
    ours = paired_difference(before, after, metric=perplexity, **{**USUAL, "resamples": 20_000})

    def moved(swap: np.ndarray) -> float:
        first = np.where(swap[:, None], after.values, before.values)
        second = np.where(swap[:, None], before.values, after.values)
        return float(perplexity(second.sum(axis=0)) - perplexity(first.sum(axis=0)))

    ways = np.array(np.meshgrid(*[[False, True]] * 8)).reshape(8, -1).T
    draws = np.abs([moved(swap) for swap in ways])
    assert ours["delta"] == pytest.approx(moved(ways[0]))
    assert ours["p_value"] == pytest.approx((draws >= abs(ours["delta"]) - 1e-9).mean(), abs=0.01)


def test_a_pair_is_surer_than_its_halves() -> None:
    """Every row a little worse: each model alone is spread by the texts, the difference is not."""
    before = scored(4, 200)
    after = written_out(before.values + np.outer(before.values[:, 1], [0.02, 0, 0]))
    alone = bootstrap(before, metrics={"perplexity": perplexity}, **USUAL)["perplexity"]
    pair = paired_difference(before, after, metric=perplexity, **USUAL)
    assert 0 < pair["low"] < pair["delta"] < pair["high"]
    assert pair["delta"] == pytest.approx(alone["value"] * (math.exp(0.02) - 1))
    assert pair["high"] - pair["low"] < 0.05 * (alone["high"] - alone["low"])
    assert pair["p_value"] == 1 / 2001


def test_the_same_scores_are_no_difference() -> None:
    rows = scored(5, 50)
    difference = paired_difference(rows, rows, metric=perplexity, **USUAL)
    assert difference == {"delta": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_scores_of_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="must be of the same rows, got 5 rows"):
        paired_difference(scored(0, 5), scored(0, 6), metric=perplexity, **USUAL)
    with pytest.raises(ValueError, match="at least one row"):
        written_out(np.zeros((0, 3)))
