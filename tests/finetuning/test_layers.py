"""The hierarchy of layers: rates by hand, every parameter in one group, the thaw from the head down."""

import pytest

from moss_rlhf.finetuning import layer_learning_rates
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.strategy import lowest_trained

FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "distilbert")


def test_rates_by_hand():
    assert layer_learning_rates(2, 1.0, 0.5) == [0.125, 0.25, 0.5, 1.0]
    assert layer_learning_rates(0, 3e-5, 1.0) == [3e-5, 3e-5]


@pytest.mark.parametrize(("depth", "decay"), [(-1, 0.9), (2, 0.0), (2, 1.1)])
def test_rates_refuse_what_is_no_hierarchy(depth, decay):
    with pytest.raises(ValueError, match="depth must be >= 0 and decay in"):
        layer_learning_rates(depth, 1e-4, decay)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_group(tiny_model, family):
    network = tiny_model(family).network
    groups = layer_groups(network)
    assert [group.name for group in groups] == ["embeddings", "block.0", "block.1", "block.2", "head"]
    members = [id(parameter) for group in groups for _, parameter in group.parameters]
    assert sorted(members) == sorted(id(parameter) for parameter in network.parameters())
    assert all(group.parameters for group in groups)
    assert any("classifier" in name for name, _ in groups[-1].parameters)


def test_gradual_thaw_by_hand():
    # 5 groups, 16 steps: everything trains from step 8 on, one more group every two steps
    lowest = [lowest_trained(step, 16, 5, "gradual") for step in range(16)]
    assert lowest == [4, 4, 3, 3, 2, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_all_trains_everything_from_the_start():
    assert {lowest_trained(step, 9, 5, "all") for step in range(9)} == {0}


def test_one_step_trains_at_least_the_head():
    assert lowest_trained(0, 1, 5, "gradual") == 4
