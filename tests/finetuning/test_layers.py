"""The hierarchy of layers: rates by hand, every parameter in one group, the thaw from the head down."""

import pytest

from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.finetuning import finetune, layer_learning_rates
from moss_rlhf.finetuning.layers import damage_multipliers, damage_order, layer_groups
from moss_rlhf.finetuning.planning import damage_of, epochs_of, phases_of, timetable_of
from moss_rlhf.model.config import group_names
from moss_rlhf.model.damage import block_damage
from moss_rlhf.optimization import sensitivity
from moss_rlhf.strategy import constant, linear, lowest_trained

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


def test_head_first_by_hand():
    assert [lowest_trained(step, 7, 5, "head_first") for step in range(7)] == [4, 4, 0, 0, 0, 0, 0]
    assert lowest_trained(0, 2, 5, "head_first") == 0  # no third of two steps


# --- timetables -----------------------------------------------------------------------------------------------------

GROUPS = ("embeddings", "block.0", "block.1", "head")


def _table(phases=(), **options):
    usual = {
        "unfreeze": "all",
        "steps": 8,
        "steps_per_epoch": 4,
        "learning_rate": 1.0,
        "schedule": linear,
        "warmup": 0.0,
        "layer_decay": 1.0,
        "damage": None,
    }
    planned = phases_of(list(phases) or None, dict.fromkeys(GROUPS, 1), options.get("unfreeze", "all"))
    return timetable_of(GROUPS, planned, **(usual | options))


def _rates(table, step):
    return [peak * table.multiplier(step, group) for group, peak in enumerate(table.peaks)]


def test_phases_by_hand():
    """One epoch of the head at 8, linear; then two of all at 1, constant, each layer at half of the next above."""
    table = _table(
        [
            {"train": ["head"], "learning_rate": 8.0},
            {"train": "all", "epochs": 2, "schedule": "constant", "layer_decay": 0.5},
        ]
    )
    assert table.peaks == (0.125, 0.25, 0.5, 8.0)
    assert [table.trains(step) for step in (0, 3)] == [(False, False, False, True)] * 2
    assert [table.trains(step) for step in (4, 11, 12)] == [(True,) * 4] * 3
    assert _rates(table, 0) == [0, 0, 0, 8.0]
    assert _rates(table, 3) == [0, 0, 0, 2.0]  # (4 - 3) / 4 of the phase's own four steps
    assert _rates(table, 4) == _rates(table, 11) == [0.125, 0.25, 0.5, 1.0]


def test_a_phase_takes_from_the_stage_what_it_leaves_out():
    table = _table([{"train": ["block.1"]}], warmup=0.5, schedule=constant, layer_decay=0.5)
    assert table.peaks == (0, 0, 0.5, 0)
    assert [table.multiplier(step, 2) for step in range(4)] == [1 / 3, 2 / 3, 1.0, 1.0]


def test_head_first_is_two_schedules():
    table = _table(unfreeze="head_first", steps=6)
    assert [sum(table.trains(step)) for step in range(6)] == [1, 1, 4, 4, 4, 4]
    assert [table.multiplier(step, 3) for step in range(6)] == [1.0, 0.5, 1.0, 0.75, 0.5, 0.25]


def test_rates_by_damage_by_hand():
    # damage 1, 4, 2: ε + d / max = 0.75, 1.5, 1.0, whose mean is 13/12
    multipliers = damage_multipliers([1.0, 4.0, 2.0])
    assert multipliers == pytest.approx([6 / 13, 9 / 13, 18 / 13, 12 / 13, 1.0])
    assert sum(multipliers[1:-1]) == pytest.approx(3.0)
    assert damage_multipliers([0.0, 0.0]) == [1.0, 1.0, 1.0, 1.0]
    assert damage_order([1.0, 4.0, 2.0, 2.0]) == (5, 2, 4, 3, 1, 0)


def test_the_most_damaged_block_thaws_first_and_learns_fastest():
    table = _table(unfreeze="gradual", damage=[3.0, 1.0])
    # ε + d / max = 1.5 and 5/6, whose mean is 7/6
    assert table.peaks == pytest.approx((3 / 7, 9 / 7, 5 / 7, 1.0))
    thawed = [table.trains(step) for step in range(5)]
    assert thawed[0] == (False, False, False, True)
    assert thawed[2] == (False, True, False, True)  # block.0, though it is the lower one
    assert thawed[4] == (True, True, True, True)


def test_damage_is_read_off_the_table(tiny_model, rows):
    model = tiny_model()
    names = [group.name for group in layer_groups(model.network)]
    with pytest.raises(ModelError, match="Put a sensitivity stage before this one"):
        finetune(model, rows[:8], rows[:8], epochs=1, layers="by_damage")
    sensitivity(model, rows[:16])
    table = block_damage(model.sensitivity)
    assert damage_of(model.sensitivity, names) == [table["block.0"], table["block.1"], table["block.2"]]
    with pytest.raises(ModelError, match="was measured on"):
        damage_of(model.sensitivity, names[1:])
    facts = finetune(model, rows[:8], rows[:8], epochs=1, learning_rate=1e-3, layers="by_damage").facts
    rates = facts["learning_rates"]
    assert max(table, key=table.get) == max(table, key=rates.get)
    assert sum(rates[name] for name in table) == pytest.approx(3e-3)


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        (
            [{"train": ["block.7"]}],
            r"phases\.0\.train: there is no group 'block.7'. The groups are embeddings",
        ),
        ([{"train": []}], "give all, or a list"),
        ([{"train": "head"}], "give all, or a list"),
        ([{"train": "all", "epochs": 0}], "trains nothing"),
        ([{"train": "all"}, {"train": "all", "learning_rate": 0.0}], r"phases\.1\.learning_rate: 0.0 moves nothing"),
        ([{"schedule": "reduce_on_plateau"}], r"phases\.0\.schedule: reduce_on_plateau follows the evaluations of all"),
        ([], "is empty"),
        ([{"trian": "all"}], "unknown field 'trian'; did you mean 'train'"),
    ],
)
def test_impossible_phases_are_refused(phases, message):
    with pytest.raises(RecipeError, match=message):
        phases_of(phases, dict.fromkeys(GROUPS, 1), "all")


def test_what_says_the_same_thing_twice_is_refused():
    with pytest.raises(RecipeError, match="both say what trains when"):
        phases_of([{"train": "all"}], dict.fromkeys(GROUPS, 1), "gradual")
    phases = phases_of([{"epochs": 2}, {"epochs": 3}], dict.fromkeys(GROUPS, 1), "all")
    assert (epochs_of(None, phases), epochs_of(5, phases), epochs_of(None, []), epochs_of(7, [])) == (5, 5, 3, 7)
    with pytest.raises(RecipeError, match="the phases have 5 together"):
        epochs_of(4, phases)
    with pytest.raises(RecipeError, match="both set the rates"):
        _table(damage=[1.0, 2.0], layer_decay=0.9)


def test_a_head_tied_to_the_embeddings_does_not_train_alone(tiny_model, rows_of):
    model = tiny_model("bart")
    rows = rows_of(model.task)[:8]
    for options in ({"unfreeze": "gradual"}, {"phases": [{"train": ["head"]}]}):
        with pytest.raises(RecipeError, match="tied to the embeddings"):
            finetune(model, rows, rows, **options)


@pytest.mark.parametrize("family", ["bert", "t5", "albert", "gpt2"])
def test_the_groups_are_known_from_the_shapes(tiny_model, family):
    model = tiny_model(family)
    assert group_names(model.anatomy.shapes) == [group.name for group in layer_groups(model.network)]
