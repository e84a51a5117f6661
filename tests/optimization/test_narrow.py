import copy

import pytest
import torch

from moss_rlhf import load, narrow, quantize, save
from moss_rlhf.errors import DataError, ModelError, UserError
from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.cost import block_macs, block_parameters
from moss_rlhf.optimization.calibration import mean_loss
from moss_rlhf.optimization.unit_scores import Part
from moss_rlhf.tasks.loading import encoded

PRIMES = {"hidden": 35, "heads": 5, "blocks": 3, "feed_forward": 53}  # head size 7


def weights_of(model):
    return [parameter.clone() for parameter in model.network.parameters()]


def assert_unchanged(model, before):
    assert all(torch.equal(new, old) for new, old in zip(model.network.parameters(), before, strict=True))


def block_cost(model, of, length):
    dimensions = model.dimensions
    count = {"macs": lambda shape: block_macs(shape, dimensions, length)}.get(
        of, lambda shape: block_parameters(shape, dimensions)
    )
    return sum(count(shape) for shape in dimensions.blocks)


def test_the_units_of_lowest_score_go_and_the_others_keep_their_weights(tiny_model, rows):
    model, whole = tiny_model(**PRIMES), tiny_model(**PRIMES)
    facts = narrow(model, rows, heads=0.5, feed_forward=0.5, score="magnitude", repair=False)
    assert model.anatomy.shapes == (BlockShape(3, 32),) * 3  # 5 − 2 heads; 53 − 26 = 27 neurons, up to 32
    for block, old, lost in zip(model.anatomy.blocks, whole.anatomy.blocks, facts["score_lost"], strict=True):
        of_heads = old.attention.output.weight.square().sum(dim=0).reshape(5, 7).sum(dim=1).sqrt()
        of_neurons = old.feed_forward.down.weight.norm(dim=0)
        heads, neurons = of_heads.topk(3).indices.sort().values, of_neurons.topk(32).indices.sort().values
        features = torch.cat([torch.arange(7 * head, 7 * head + 7) for head in heads])
        query, _, value, output = block.attention.matrices
        assert torch.equal(query.weight, old.attention.matrices[0].weight[features])
        assert torch.equal(value.bias, old.attention.matrices[2].bias[features])
        assert torch.equal(output.weight, old.attention.output.weight[:, features])
        assert torch.equal(block.feed_forward.ups[0].weight, old.feed_forward.ups[0].weight[neurons])
        assert torch.equal(block.feed_forward.down.weight, old.feed_forward.down.weight[:, neurons])
        assert lost["heads"] == pytest.approx(1 - float(of_heads[heads].sum() / of_heads.sum()), rel=1e-3)
    assert facts["rows_scored"] == 60
    assert facts["heads"] == "5 → 3 a block"
    assert facts["blocks"]["block.1"] == {"heads": [5, 3], "feed_forward": [53, 32]}
    assert "repair_error" not in facts


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("score", ["fisher", "taylor", "activation", "magnitude"])
def test_dead_units_go_first_and_cost_nothing(tiny_model, rows, score, repair):
    model = tiny_model()
    with torch.no_grad():
        for block in model.anatomy.blocks:
            block.attention.producers[2].weight[8:16] = block.attention.producers[2].bias[8:16] = 0  # head 1's values
            block.attention.output.weight[:, 8:16] = 0
            block.feed_forward.ups[0].weight[::2] = block.feed_forward.ups[0].bias[::2] = 0  # gelu(0) = 0
            block.feed_forward.down.weight[:, ::2] = 0
    sample = encoded(model, rows)
    before = mean_loss(model, sample)
    facts = narrow(model, rows, heads=0.25, feed_forward=0.5, score=score, repair=repair)
    assert mean_loss(model, sample) == pytest.approx(before, abs=1e-5)
    assert [lost for block in facts["score_lost"] for lost in block.values()] == pytest.approx([0.0] * 6, abs=1e-12)


@torch.no_grad()
def test_the_repair_brings_the_answers_nearer_to_the_uncut_ones(tiny_model, rows):
    models = {repair: tiny_model() for repair in (False, True)}
    inputs = dict(models[True].tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True))
    wanted = tiny_model().network.eval()(**inputs).logits
    for repair, model in models.items():
        facts = narrow(model, rows, heads=0.5, feed_forward=0.6, repair=repair)
        if repair:
            assert all(after < before for before, after in facts["repair_error"].values())
    errors = {
        repair: float((model.network(**inputs).logits - wanted).square().mean()) for repair, model in models.items()
    }
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("of", ["macs", "parameters"])
def test_a_budget_is_met_and_nearly_used_up(tiny_model, rows_of, family, of):
    model = tiny_model(family)
    train = rows_of(model.task)
    length = float(encoded(model, train).to_pandas()["length"].mean())
    before = block_cost(model, of, length)
    facts = narrow(model, train, rows=60, score="activation", repair=False, **{of: 0.4})
    share = block_cost(model, of, length) / before
    unit = 1 / (2 if FAMILIES[family].same_heads or FAMILIES[family].shared else 4)  # steps of a head, or of 8 neurons
    assert 0.6 - unit < share <= 0.6 + 1e-9
    assert all(shape.heads >= 1 and shape.feed_forward >= 8 for shape in model.anatomy.shapes)
    assert all(shape.feed_forward % 8 == 0 for shape in model.anatomy.shapes)
    assert facts["faster_here"].startswith("yes")


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_a_stack_that_shares_position_biases_keeps_the_same_heads(tiny_model, rows_of, family):
    model = tiny_model(family)
    narrow(model, rows_of("translation"), macs=0.5, rows=12)
    for stack in ("encoder", "decoder"):
        assert len({(s.heads, s.cross_heads) for s in (block.shape for block in model.anatomy.stack(stack))}) == 1


def test_a_measured_time_goes_where_it_costs_least_by_the_callers_own_clock(tiny_model, rows):
    def measure(shape, width):
        return 1.0 * width if shape.head_size else 0.0  # neurons cost nothing here

    model = tiny_model()
    facts = narrow(model, rows, latency=0.5, measure=measure, repair=False)
    assert sum(shape.heads for shape in model.anatomy.shapes) == 6
    assert all(shape.feed_forward == 48 for shape in model.anatomy.shapes)
    assert "time" in facts["faster_here"]


def test_the_dearer_part_is_spared(tiny_model, rows):
    model = tiny_model()
    with torch.no_grad():
        model.anatomy.blocks[1].feed_forward.down.weight.mul_(1e-4)
    narrow(model, rows, macs=0.25, repair=False)
    widths = [shape.feed_forward for shape in model.anatomy.shapes]
    assert widths[1] == 8
    assert min(widths[0], widths[2]) > 8


def test_steps_end_where_one_cut_ends(tiny_model, rows):
    once, thrice = tiny_model(), tiny_model()
    narrow(once, rows, heads=0.5, feed_forward=0.5)
    narrow(thrice, rows, heads=0.5, feed_forward=0.5, steps=3)
    assert once.anatomy.shapes == thrice.anatomy.shapes == (BlockShape(2, 24),) * 3


def test_the_hidden_size_keeps_the_features_that_carry_most(tiny_model, rows):
    model = tiny_model(**{**PRIMES, "hidden": 40})
    with torch.no_grad():  # the norms hand on nothing of the first 8 features
        for name, parameter in model.network.named_parameters():
            if "LayerNorm" in name:
                parameter[:8] = 0
    whole = copy.deepcopy(model)
    facts = narrow(model, rows, hidden=0.2)
    assert model.anatomy.hidden_size == 32
    assert facts["hidden"] == "40 → 32; fine-tune before use"
    up, old = (found.anatomy.blocks[0].feed_forward.ups[0].weight for found in (model, whole))
    assert torch.equal(up, old[:, 8:])


def test_one_share_alone_leaves_the_other_matrices_alone(tiny_model, rows):
    model, whole = tiny_model(), tiny_model()
    narrow(model, rows, heads=0.5, rows=8, repair=False)
    assert model.anatomy.shapes == (BlockShape(2, 48),) * 3
    ours, theirs = (found.anatomy.blocks[1].feed_forward.ups[0].weight for found in (model, whole))
    assert torch.equal(ours, theirs)


def test_an_uneven_model_loses_the_share_of_each_block(tiny_model, rows):
    model = tiny_model()
    narrow(model, rows, heads=0.5, rows=8)
    narrow(model, rows, heads=0.5, feed_forward=0.3, rows=8)
    assert model.anatomy.shapes == (BlockShape(1, 40),) * 3


def test_the_same_seed_gives_the_same_network(tiny_model, rows):
    found = []
    for seed in (1, 1, 2):
        model = tiny_model()
        narrow(model, rows, macs=0.4, rows=9, seed=seed)
        found.append(torch.cat([parameter.flatten() for parameter in model.network.parameters()]))
    assert torch.equal(found[0], found[1])
    assert found[0].shape != found[2].shape or not torch.equal(found[0], found[2])


def test_pruned_zeros_survive_repair_and_save(tiny_model, rows, tmp_path):
    model = tiny_model()
    block = model.anatomy.blocks[0]
    sparse, gone = block.feed_forward.down.parameter, block.feed_forward.ups[0].parameter
    with torch.no_grad():
        sparse[:, ::3] = 0
        sparse[::2] = 0
        gone[0] = 0  # of a neuron that goes
        sparse[:, 0] = 0
    model.pruned = [sparse, gone]
    zeros = sparse == 0
    kept = Part(block, "feed_forward")
    facts = narrow(model, rows, feed_forward=0.4, heads=0.5)
    assert model.pruned == [sparse]  # gone lost its zeros with the neuron: nothing is left to keep
    assert sparse.shape == (32, kept.units)
    assert bool((sparse[::2] == 0).all())
    assert int((sparse == 0).sum()) < int(zeros.sum())
    assert "block.0.feed_forward" not in facts["repair_error"]
    save(model, tmp_path / "narrow")
    assert load(tmp_path / "narrow").anatomy.shapes == model.anatomy.shapes


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"heads": 1.0}, r"narrow\.heads: 1\.0 can't be used; it must be less than 1"),
        ({"feed_forward": -0.1}, r"narrow\.feed_forward: -0\.1 can't be used"),
        ({"macs": 1.0}, r"narrow\.macs: 1\.0 can't be used"),
        ({"latency": float("nan")}, r"narrow\.latency: nan can't be used"),
        ({}, "removes nothing; give heads"),
        ({"heads": 0.2}, "would remove nothing of 4 heads, 48 neurons"),  # 0.8 of a head
        ({"feed_forward": 0.1}, "would remove nothing of 4 heads, 48 neurons"),  # 44 of 48 are rounded up again
        ({"hidden": 0.1}, "would remove nothing of 4 heads, 48 neurons"),
        ({"heads": 0.5, "macs": 0.5}, "heads, macs can't be met together"),
        ({"parameters": 0.5, "macs": 0.5}, "macs, parameters can't be met together"),
        ({"macs": 0.95}, r"macs 0\.95 can't be removed: with one head and 8 neurons in every block, 0\.7"),
        ({"heads": 0.5, "score": "fischer"}, "score: 'fischer' can't be used; it must be 'fisher'"),
        ({"heads": 0.5, "steps": 0}, "steps: 0 can't be used; it must be greater than or equal to 1"),
        ({"heads": 0.5, "multiple_of": 0}, "multiple_of: 0 can't be used; it must be greater than or equal to 1"),
    ],
)
def test_what_narrowing_refuses_leaves_the_model_as_it_was(tiny_model, rows, options, word):
    model = tiny_model()
    before = weights_of(model)
    with pytest.raises(UserError, match=word):
        narrow(model, rows, rows=8, **options)
    assert_unchanged(model, before)


@pytest.mark.parametrize("score", ["fisher", "activation", "magnitude"])
def test_weights_and_activations_that_are_not_finite_are_refused(tiny_model, rows, score):
    model = tiny_model()
    name, parameter = next(iter(model.network.named_parameters()))
    parameter.data[3, 4] = torch.inf
    with pytest.raises(ModelError, match=f"narrow: {name}: weight is not finite: the checkpoint holds inf or nan"):
        narrow(model, rows, heads=0.5, score=score)
    model = tiny_model()
    model.anatomy.blocks[1].feed_forward.ups[0].weight.fill_(3e38)  # finite, and overflows
    before = weights_of(model)
    with pytest.raises(ModelError, match="not finite"):
        narrow(model, rows, heads=0.5, score=score)
    assert_unchanged(model, before)


def test_a_quantized_model_is_not_narrowed_and_no_rows_are_no_sample(tiny_model):
    model = tiny_model()
    with pytest.raises(DataError, match="no rows"):
        narrow(model, encoded(model, [{"text": "bad", "label": 0}]).select([]), heads=0.5)
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        narrow(model, [{"text": "bad", "label": 0}], heads=0.5)
