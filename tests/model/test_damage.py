"""A table of sensitivity cut down to what survives, and the damage that compressing did: every number by hand."""

import pytest

from moss_rlhf.errors import ModelError
from moss_rlhf.model.damage import (
    Kept,
    after_narrowing,
    after_pruning,
    after_rounding,
    after_shortening,
    block_damage,
)


def scores(half, heads, drop=0.1):
    return {
        "drop": drop,
        "prune": {"0.4": 1.0, "0.5": half, "0.9": 9.0},
        "bits": {"8": 0.25, "4": 3.0},
        "heads": heads,
        "feed_forward": [0.5, 0.25, 0.125],
    }


@pytest.fixture
def table():
    blocks = {
        "block.0": scores(2.0, [1.0, 2.0]),
        "block.1": scores(4.0, [3.0, 5.0]),
        "block.2": scores(8.0, [7.0, 9.0]),
    }
    return {"network": "digest", "rows": 4, "matrices": {"a": {}}, "blocks": blocks}


def test_before_anything_is_compressed_damage_is_what_half_of_the_weights_would_cost(table):
    assert block_damage(table) == {"block.0": 2.0, "block.1": 4.0, "block.2": 8.0}


def test_narrowing_keeps_the_survivors_scores_and_counts_what_went(table):
    kept = {
        "block.0": Kept({"heads": [1], "feed_forward": [0, 2]}, lost=1.25),
        "block.1": Kept({}, lost=0.0),
        "block.2": Kept({"heads": [0]}, lost=9.0),
    }
    after = after_narrowing(table, kept)
    assert after["blocks"]["block.0"]["heads"] == [2.0]
    assert after["blocks"]["block.0"]["feed_forward"] == [0.5, 0.125]
    assert after["blocks"]["block.1"]["heads"] == [3.0, 5.0]
    assert after["blocks"]["block.2"]["heads"] == [7.0]
    assert "matrices" not in after  # they have other weights now
    assert block_damage(after) == {"block.0": 1.25, "block.1": 0.0, "block.2": 9.0}
    assert table["blocks"]["block.0"]["heads"] == [1.0, 2.0]


def test_a_block_that_goes_leaves_its_damage_and_its_worth_to_its_heir(table):
    narrowed = after_narrowing(table, {f"block.{index}": Kept({}, lost=10.0 + index) for index in range(3)})
    after = after_shortening(narrowed, {"block.0": ["block.0"], "block.1": ["block.2", "block.1"]})
    assert list(after["blocks"]) == ["block.0", "block.1"]
    assert after["blocks"]["block.1"]["heads"] == [7.0, 9.0]  # the old block 2 under its new name
    # 12 of its own, 11 of the one that went, and all units of that one: 3 + 5 + 0.875
    assert block_damage(after) == {"block.0": 10.0, "block.1": 12.0 + 11.0 + 8.875}


def test_pruning_and_rounding_spend_from_the_curves_and_add_up(table):
    pruned = after_pruning(table, {"block.0": 0.2, "block.1": 0.45, "block.2": 0.9})
    assert block_damage(pruned) == {"block.0": pytest.approx(0.5), "block.1": pytest.approx(2.5), "block.2": 9.0}
    both = after_rounding(pruned, 8)
    assert block_damage(both) == {"block.0": pytest.approx(0.75), "block.1": pytest.approx(2.75), "block.2": 9.25}


def test_facts_of_a_stage_that_hold_damage_serve_as_well():
    assert block_damage({"removed": "much", "damage": {"block.0": 1}}) == {"block.0": 1.0}


def test_where_nothing_is_known_the_remedy_is_named():
    assert after_pruning(None, {"block.0": 0.5}) is None
    assert after_shortening(None, {}) is None
    for source in (None, {}, {"blocks": {"block.0": {"heads": [12, 6]}}}):  # the last is narrow's facts
        with pytest.raises(ModelError, match="Put a sensitivity stage before"):
            block_damage(source)


def test_damage_stands_alone_where_no_table_was_measured():
    after = after_narrowing(None, {"block.0": Kept({"heads": [0]}, lost=2.0)})
    assert after == {"damage": {"block.0": 2.0}}
    assert after_pruning(after, {"block.0": 0.5}) == after
    assert after_rounding(after, 8) == after
