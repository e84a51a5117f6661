import pytest

from moss_rlhf.reporting import wording


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (1234.4, "1,234"),
        (597.2, "597"),
        (8.214, "8.21"),
        (0.0312, "0.0312"),
        (5e-5, "5e−05"),
        (-2.5, "−2.50"),
    ],
)
def test_significant(value, words):
    assert wording.significant(value) == words


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        (wording.size, 999, "999 B"),
        (wording.size, 1000, "1.00 kB"),
        (wording.size, 90_900_000, "90.9 MB"),
        (wording.flops, 1.24e15, "1.24 PFLOP"),
        (wording.flops, 3e22, "30,000 EFLOP"),
        (wording.duration, 4.44, "4.4 s"),
        (wording.duration, 9.97, "10 s"),
        (wording.duration, 59.6, "1 min 0 s"),
        (wording.duration, 725, "12 min 5 s"),
        (wording.duration, 4800, "1 h 20 min"),
        (wording.times, 9.94, "9.9×"),
        (wording.times, 9.96, "10×"),
        (wording.count, 22_713_986, "22,713,986"),
        (wording.score, 0.8654, "0.865"),
        (wording.signed, -0.006, "−0.006"),
        (wording.signed, 0.0041, "+0.004"),
        (wording.signed, -0.0004, "±0.000"),
        (wording.score, 23.4567, "23.46"),
        (wording.score, 12345.6, "12,346"),
        (wording.signed, 23.4567, "+23.46"),
        (wording.signed, -1234.5, "−1,234"),
        (wording.milliseconds, 0.902, "0.902 ms"),
        (wording.rate, 597.2, "597 /s"),
    ],
)
def test_units(function, value, words):
    assert function(value) == words
    assert function(None) == "not measured"


def test_estimate_with_and_without_interval():
    assert wording.estimate({"value": 0.871, "low": 0.848, "high": 0.893}) == "0.871 (0.848 to 0.893)"
    assert wording.estimate({"value": 0.871, "low": None, "high": None}) == "0.871"
    assert wording.estimate({"value": None, "low": None, "high": None}) == "not measured"
    assert wording.estimate(None) == "not measured"


@pytest.mark.parametrize(
    ("ratio", "mark", "words"),
    [(5.3, "better", "5.3× smaller"), (0.5, "worse", "2.0× larger"), (1.04, "same", "equal"), (0.97, "same", "equal")],
)
def test_a_ratio_and_its_inverse_are_told_in_the_same_way(ratio, mark, words):
    assert wording.mark_of_ratio(ratio) == mark
    assert wording.ratio_in_words(ratio, "smaller", "larger", "equal") == words


def change(low, high):
    return {"name": "accuracy", "delta": 0.01, "low": low, "high": high, "p_value": None}


@pytest.mark.parametrize(
    ("low", "high", "mark"),
    [
        (-0.01, 0.02, "same"),
        (0.0, 0.02, "same"),
        (0.001, 0.02, "better"),
        (-0.03, -0.001, "worse"),
        (None, None, "unknown"),
    ],
)
def test_a_metric_changed_only_where_the_interval_leaves_out_zero(low, high, mark):
    assert wording.mark_of_metric(change(low, high)) == mark


def test_change_in_words():
    fall = {"name": "accuracy", "delta": -0.05, "low": -0.062, "high": -0.038}
    assert (
        wording.change_in_words(fall, 0.9)
        == "−0.050, 90 % interval −0.062 to −0.038: accuracy fell, outside what chance explains"
    )
    assert wording.change_in_words(change(None, None), 0.9) == "+0.010, interval not measured"


@pytest.mark.parametrize(("low", "high", "mark"), [(-2.0, -0.5, "better"), (0.5, 2.0, "worse"), (-1.0, 1.0, "same")])
def test_a_perplexity_that_falls_is_better(low, high, mark):
    lower = {"name": "perplexity", "delta": (low + high) / 2, "low": low, "high": high, "lower_is_better": True}
    assert wording.mark_of_metric(lower) == mark
    words = {"better": "perplexity fell, outside", "worse": "perplexity rose, outside", "same": "no significant"}
    assert words[mark] in wording.change_in_words(lower, 0.95)


def test_an_interval_without_zero_is_no_proof_where_the_exact_test_says_chance():
    """Three answers of 60 that all became wrong: no resample sees another side, and three coins may fall alike."""
    fall = {"name": "accuracy", "delta": -0.05, "low": -0.117, "high": -0.016, "p_value": 0.25}
    assert wording.mark_of_metric(fall) == "same"
    assert wording.change_in_words(fall, 0.95).endswith("−0.016: no significant difference (p = 0.25)")
    assert wording.mark_of_metric(fall | {"p_value": 0.01}) == "worse"
