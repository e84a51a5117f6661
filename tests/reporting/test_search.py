"""What the page and the terminal say of a search, from facts made by hand."""

import json
import re

import pytest

from moss_rlhf.reporting import render_page, search, terminal_summary

HOSTILE = "</script><script>alert(1)</script>"
RATE, THAW = "stages.0.finetune.learning_rate", "stages.0.finetune.unfreeze"


def _trial(number, rate, thaw, value, state="done", why=None):
    return {"number": number, "values": {RATE: rate, THAW: thaw}, "state": state, "value": value, "why": why}


@pytest.fixture
def facts():
    return {
        "metric": "accuracy",
        "lower_is_better": False,
        "split": "validation",
        "trials": [
            _trial(0, 1e-5, "all", 0.81),
            _trial(1, 3e-4, "gradual", 0.874),
            _trial(2, 5e-4, "all", None, "failed", f"the loss is not finite {HOSTILE}"),
            _trial(3, 1e-4, "all", 0.874),
            _trial(4, 2e-5, "all", None, "stopped", "below the median of the finished trials"),
        ],
        "winner": {"seeds": 3, "values": [0.85, 0.86, 0.87], "mean": 0.86, "low": 0.8352, "high": 0.8848},
    }


def test_trials_stand_by_value_and_those_without_one_last(facts):
    assert [trial["number"] for trial in search.sorted_trials(facts)] == [1, 3, 0, 2, 4]
    facts["lower_is_better"] = True
    assert [trial["number"] for trial in search.sorted_trials(facts)] == [0, 1, 3, 2, 4]


def test_the_winner_in_words(facts):
    assert search.winner_in_words(facts) == (
        "Trial 1 won with accuracy 0.874 on validation; the best of many is partly luck. Trained again with 3 other "
        "seeds it reaches 0.860 on average (0.850, 0.860, 0.870); with 95 % confidence the true mean lies between "
        "0.835 and 0.885."
    )
    facts["winner"] = {"seeds": 1, "values": [0.85], "mean": 0.85, "low": None, "high": None}
    assert search.winner_in_words(facts).endswith(
        "with 1 other seed it reaches 0.850; a single training says nothing of how far others would differ."
    )
    assert search.trials_in_words(facts) == "5 trials: 3 done, 1 stopped early, 1 failed."


def test_values_as_a_recipe_has_them():
    values = [1e-4, 3, "gradual", True, None, {"patience": 2}, [1, "中"]]
    words = ["0.0001", "3", "gradual", "true", "null", '{"patience": 2}', '[1, "中"]']
    assert [search.value_in_words(value) for value in values] == words


def _drawn(chart):
    """The traces and the layout of a chart, out of its script."""
    found = re.search(
        r"Plotly\.newPlot\(\s*\"[^\"]+\",\s*(\[.*?\]),\s*(\{.*\}),\s*\{\"displayModeBar", chart, re.DOTALL
    )
    return json.loads(found.group(1)), json.loads(found.group(2))


def test_charts_hold_each_finished_trial_by_number_and_by_setting(facts):
    drawn = search.search_charts(facts)
    assert list(drawn) == ["By trial", f"By {RATE}", f"By {THAW}"]
    (best, points), _ = _drawn(drawn["By trial"])
    assert (points["x"], points["y"]) == ([0, 1, 3], [0.81, 0.874, 0.874])
    assert best["y"] == [0.81, 0.874, 0.874]
    (points,), layout = _drawn(drawn[f"By {RATE}"])
    assert (points["x"], points["y"]) == ([1e-5, 3e-4, 1e-4], [0.81, 0.874, 0.874])
    assert layout["xaxis"]["type"] == "log"
    (points,), layout = _drawn(drawn[f"By {THAW}"])
    assert points["x"] == ["all", "gradual", "all"]
    assert layout["xaxis"]["type"] == "category"


def test_the_best_so_far_falls_where_lower_is_better(facts):
    facts["lower_is_better"] = True
    (best, _), _ = _drawn(search.search_charts(facts)["By trial"])
    assert best["y"] == [0.81, 0.81, 0.81]


def test_the_page_tells_of_the_search_and_escapes_it(report, facts):
    page = render_page(report | {"search": facts})
    assert search.winner_in_words(facts) in page
    assert "<td>gradual</td>" in page
    assert "stopped: below the median of the finished trials" in page
    assert HOSTILE not in page
    assert page == render_page(report | {"search": facts})
    assert "<h2>Search</h2>" in page
    assert "<h2>Search</h2>" not in render_page(report)


def test_the_terminal_has_a_line_of_it(report, facts):
    lines = terminal_summary(report | {"search": facts}).splitlines()
    assert (
        "  search      best of 5 trials 0.874, again with 3 seeds 0.860 (0.835 to 0.885), accuracy on validation"
        in lines
    )
    assert len(lines) <= 10
