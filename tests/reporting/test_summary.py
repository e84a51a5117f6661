import pytest

from moss_rlhf.reporting import summary, terminal_summary


def test_verdict_of_a_good_result(report):
    assert summary.headline(report) == "Faster, smaller, no measurable loss of accuracy"
    assert summary.verdict(report) == (
        "4.2× more texts per second, 9.1× lower latency, 5.3× smaller; "
        "accuracy 0.871 → 0.865 (−0.006, 95 % interval −0.017 to +0.004: no significant difference)."
    )


def test_verdict_of_a_bad_result_says_so(report):
    report["gain"] = {
        "metric": {"name": "accuracy", "delta": -0.05, "low": -0.062, "high": -0.038, "p_value": 1e-9},
        "size": 0.8,
        "speedup": {"1": 2.0, "32": 0.5},
        "latency": {"1": 0.25, "32": 3.0},
    }
    assert summary.headline(report) == "Slower, larger, accuracy down"
    words = summary.verdict(report)
    assert words.startswith("2.0× fewer texts per second, 4.0× higher latency, 1.2× larger; accuracy")
    assert "accuracy fell, outside what chance explains" in words


def test_too_few_rows_are_not_called_no_loss(report):
    report["gain"]["metric"] |= {"delta": -0.01, "low": -0.05, "high": 0.03}
    assert summary.headline(report) == "Faster, smaller, a loss of accuracy not ruled out"


def test_three_answers_that_all_fell_are_no_proof(report):
    report["gain"]["metric"] |= {"delta": -0.05, "low": -0.117, "high": -0.016, "p_value": 0.25}
    assert summary.headline(report) == "Faster, smaller, a loss of accuracy not ruled out"
    text = " ".join(summary.reasons(report))
    assert (
        "between −0.117 and −0.016; it may be chance (p = 0.25): few answers differ. So a fall of up to 0.117" in text
    )


def test_answers_that_never_differ_are_told_by_the_rule_of_three(report):
    report["gain"]["metric"] |= {"delta": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    report["after"]["rows"] = 60
    text = " ".join(summary.reasons(report))
    assert "No answer counted differently. With 95 % confidence, less than 5 % of new texts would (3 / rows)." in text
    assert "±0.000" not in text


def test_a_model_against_itself_is_neither_faster_nor_slower(report):
    report["gain"] |= {"identical": True, "size": 1.0}
    assert summary.headline(report) == "Before and after are the same model: nothing was compressed"
    assert summary.speed_ratios(report["gain"]) == (1.0, 1.0)


def test_speed_that_pulls_both_ways_is_not_called_faster(report):
    report["gain"]["latency"] = {"1": 0.5}
    assert summary.headline(report).startswith("More texts per second but higher latency, smaller")
    report["gain"].update(latency={"1": 2.0}, speedup={"32": 0.5})
    assert summary.headline(report).startswith("Lower latency but fewer texts per second, smaller")


def test_without_speed_the_verdict_is_about_the_rest(report):
    report["gain"].update(speedup={}, latency={})
    assert summary.headline(report) == "Smaller, no measurable loss of accuracy"
    assert summary.verdict(report).startswith("5.3× smaller; accuracy")


def test_without_gain_the_notes_say_why(report):
    report.update(gain=None, before=None, reference=None, notes=["The head was never trained."])
    assert summary.headline(report) == "Nothing to compare with"
    assert "The head was never trained. It reaches accuracy 0.865 (0.842 to 0.888)." in summary.verdict(report)


def test_reasons_name_what_the_test_cannot_rule_out(report):
    text = " ".join(summary.reasons(report))
    assert "onnx/model.onnx itself, run by ONNX Runtime int8" in text
    assert "872 rows of the test split" in text
    assert "So a fall of up to 0.017 can't be ruled out" in text
    # 346.7 / 142.2 = 2.44 and 597.2 / 346.7 = 1.72
    assert "in float32, are 2.4× as fast as before; the number format multiplies that by 1.72" in text


def test_a_sure_gain_leaves_no_fall_to_warn_of(report):
    report["gain"]["metric"].update(delta=0.02, low=0.01, high=0.03)
    assert "ruled out" not in " ".join(summary.reasons(report))


def test_validation_in_place_of_test_is_warned_of(report):
    report["after"]["split"] = "validation"
    assert "expect a little less on new texts" in " ".join(summary.reasons(report))


def test_cost_is_the_pipeline_over_dense_fine_tuning(report):
    # 2103 / 1168 = 1.80 and 1.24e15 / 6.2e14 = 2.0
    expected = "35 min 3 s, training 1.24 PFLOP: 1.8× the time and 2.0× the training FLOPs of plain fine-tuning"
    assert summary.cost_in_words(report).startswith(expected)
    report["cost"].update(flops=None, dense_seconds=None)
    assert summary.cost_in_words(report) == "35 min 3 s, training not measured"


def test_terminal_summary_has_six_to_ten_lines(report):
    for notes, lines in ((0, 7), (1, 8), (3, 10), (4, 10), (40, 10)):
        report["notes"] = [f"note {number}" for number in range(notes)]
        assert len(terminal_summary(report).splitlines()) == lines
    assert terminal_summary(report).endswith("and 38 more notes in the report")
    assert "142 /s → 597 /s, texts in batches of 32" in terminal_summary(report)


def of_perplexity(report, delta, low, high):
    """The report of a language model whose perplexity was 20."""
    change = {"name": "perplexity", "delta": delta, "low": low, "high": high, "p_value": 0.2, "lower_is_better": True}
    report["gain"]["metric"] = change
    for side, value in (("before", 20.0), ("after", 20.0 + delta)):
        report[side]["metrics"] = {"perplexity": {"value": value, "low": value - 1, "high": value + 1}}
    return report


@pytest.mark.parametrize(
    ("delta", "low", "high", "words"),
    [
        (-2.0, -3.0, -1.0, "perplexity down"),
        (2.0, 1.0, 3.0, "perplexity up"),
        (0.1, -0.2, 0.3, "no measurable rise of perplexity"),
        (-0.1, -0.3, 0.2, "no measurable change of perplexity"),
        (0.1, -0.2, 0.5, "a rise of perplexity not ruled out"),  # 0.5 is more than 2 % of 20
        (-0.1, -9.0, 0.3, "no measurable change of perplexity"),
    ],
)
def test_a_rise_of_perplexity_is_a_loss(report, delta, low, high, words):
    found = of_perplexity(report, delta, low, high)
    found["gain"]["metric"]["p_value"] = 0.5 if low < 0 < high else 0.001
    assert summary.headline(found).endswith(words)


def test_reasons_name_the_rise_of_perplexity_that_the_test_cannot_rule_out(report):
    text = " ".join(summary.reasons(of_perplexity(report, 0.1, -0.2, 0.3)))
    assert "the true change of perplexity lies between −0.200 and +0.300" in text
    assert "So a rise of up to 0.300 can't be ruled out" in text
