"""Facts of stages that this page has never heard of."""

import json

import pytest

from moss_rlhf.reporting import charts, render_page, terminal_summary
from moss_rlhf.reporting.facts import MOST, show, stage_facts
from moss_rlhf.reporting.sensitivity import columns, text_lines


def test_what_was_removed_measured_and_gained_comes_first():
    found = stage_facts({"method": "x", "faster_here": "no", "measured": "rows", "removed": "a"})
    assert found.names == ("removed", "measured", "faster here?", "method")


def test_equal_mappings_are_a_table_however_they_are_held():
    rows = [{"name": "swap", "share": 0.1}, {"name": "delete", "share": 0.25}]
    assert show(rows).cells == (("swap", "10 %"), ("delete", "25 %"))
    named = show({"block.0": {"heads": [12, 6]}, "block.1": {"heads": [12, 5]}})
    assert (named.names, named.cells) == (("", "heads"), (("block.0", "12, 6"), ("block.1", "12, 5")))


def test_unequal_mappings_are_not():
    assert show([{"a": 1}, {"b": 2}]).kind == "items"
    assert show({"x": {"a": 1}, "y": {"a": {"b": 2}}}).kind == "pairs"
    assert show([{"a": 1}]).names == ("a",)  # one alone needs no list around it


def test_nothing_is_too_long_or_too_deep():
    deep = 1
    for _ in range(50):
        deep = {"a": deep}
    assert show(deep).kind == "pairs"
    long = show(list(range(10_000)))
    assert (long.count, len(long.parts), long.left) == (10_000, MOST, 10_000 - MOST)
    assert len(show("x" * 10**6).text) < 500
    many = show({f"key {index}": index for index in range(500)})
    assert (len(many.parts), many.left) == (MOST, 500 - MOST)
    assert show({}).text == show([]).text == "none"


@pytest.mark.parametrize("value", [None, True, 0.5, "text", [], {}, [[1, [2, [3]]]], {"a": [{"b": [1] * 9}, {"b": 2}]}])
def test_any_json_value_stands_on_the_page(report, value):
    report["stages"][1]["facts"] = {"unheard_of": value}
    assert "unheard of" in render_page(report)


# --- sensitivity ------------------------------------------------------------------------------------------------------

BLOCK = {
    "drop": 0.25,
    "prune": {"0.1": 0.001, "0.5": 0.02},
    "bits": {"8": 0.0001, "4": 0.003},
    "heads": [4.0, 1.0, 2.0],
    "feed_forward": [0.5, 0.25, 1.0, 2.0],
}


@pytest.fixture
def measured(report):
    last = {**BLOCK, "cross_heads": [1.0, 3.0]}
    facts = {"removed": "nothing", "table": {"rows": 60, "matrices": {}, "blocks": {"block.0": BLOCK, "block.1": last}}}
    report["stages"][1] |= {"kind": "sensitivity", "facts": facts}
    return report


def test_columns_by_hand(measured):
    """The cheaper half: of 3 heads one, 1.0; of 2 crossing ones 1.0; of 4 neurons 0.25 + 0.5."""
    found = columns(measured["stages"][1]["facts"]["table"])
    assert found == {
        "prune 10%": [0.001, 0.001],
        "prune 50%": [0.02, 0.02],
        "8 bits": [0.0001, 0.0001],
        "4 bits": [0.003, 0.003],
        "half the heads": [1.0, 1.0],
        "half the cross heads": [None, 1.0],
        "half the neurons": [0.75, 0.75],
    }


def test_the_heat_map_stands_on_the_page_and_in_the_terminal(measured):
    page = render_page(measured)
    assert 'id="chart-sensitivity-2"' in page
    assert "What each block would lose" in page
    assert "matrices" not in page.split("<h2>Stages")[1].split("<h2>What each")[0]  # drawn, not written out
    lines = text_lines(measured["stages"][1]["facts"]["table"])
    assert lines[1].split() == ["block.0", "0.02", "0.003", "1", "0.75", "0.250"]
    assert lines[1] in terminal_summary(measured)


def test_colours_follow_the_logarithm():
    groups = {"prune": {"a": [0.1, 0.001]}, "round": {"b": [None, 0.0]}}
    chart = charts.sensitivity_chart(1, groups, {"x": 1, "y": 0})
    values = json.loads(chart.split('"z":')[1].split(',"type"')[0].rsplit("]]", 1)[0] + "]]")
    assert values[0] == [-1.0, None, None]  # a gap between the groups, and no such part
    assert values[1] == [-3.0, None, -3.0]  # nothing is as pale as the least


# --- calibration ------------------------------------------------------------------------------------------------------


def test_temperature_and_reliability_stand_on_the_page(report):
    estimate = {"value": 0.031, "low": 0.02, "high": 0.05}
    bins = [{"rows": 100, "confidence": 0.6, "accuracy": 0.5}, {"rows": 772, "confidence": 0.95, "accuracy": 0.9}]
    report["after"]["metrics"]["log_loss"] = {"value": 0.412, "low": 0.4, "high": 0.43}
    report["calibration"] = {
        "temperature": 1.734,
        "metrics": {"log_loss": estimate},
        "reliability": bins,
        "reliability_scaled": bins,
        "rows": 769,
    }
    page = render_page(report)
    assert 'id="chart-reliability"' in page
    for text in (
        "Temperature 1.734, fitted on 769 validation rows",
        "0.412 (0.400 to 0.430)",
        "0.031 (0.020 to 0.050)",
    ):
        assert text in page
    assert "How sure it may be" not in render_page({**report, "calibration": None})
