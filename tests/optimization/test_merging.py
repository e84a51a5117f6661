from copy import deepcopy

import pytest
import torch

from moss_rlhf.model.anatomy import FAMILIES, Matrix
from moss_rlhf.model.replay import without_cache
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward
from moss_rlhf.optimization import merging
from moss_rlhf.optimization.block_states import call_with, own_tokens, replaced, traced
from moss_rlhf.optimization.merging import (
    Regression,
    average,
    collapse,
    fit_block,
    hindrance,
    merge_weights,
    ridge,
)

SINGLE = sorted(set(FAMILIES) - {"albert"})
NORMS_LAST = {"bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2", "bart", "marian"}
NORMS_FIRST = sorted(set(SINGLE) - NORMS_LAST - {"modernbert"})  # whose first block has one norm less
families = pytest.mark.parametrize("family", SINGLE)
TEXTS = ["the film was good", "bad", "what a lovely hotel , we all said so in the end", "the soup was awful , great !"]


def batches_of(model):
    """Two batches, the first one padded, with what the family's own task would hand over."""
    made = []
    for texts in (TEXTS[:2], TEXTS[2:]):
        encoded = model.tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {name: encoded[name] for name in model.tokenizer.model_input_names}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        if model.network.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = model.network.prepare_decoder_input_ids_from_labels(labels)
        made.append((inputs, labels))
    return made


def outputs(model):
    model.network.eval()
    with torch.no_grad():
        return [model.network(**inputs).logits for inputs, _ in batches_of(model)]


def silence(block):
    """Nothing that the block computes reaches the stream."""
    with torch.no_grad():
        for part in (*block.attentions, block.feed_forward):
            matrix = part.matrices[-1]
            matrix.weight.zero_()
            if matrix.bias is not None:
                matrix.bias.zero_()


def apply(model, groups, merged):
    """The network with one block where `groups` says so."""
    for parameter, value in merged.weights.items():
        parameter.data.copy_(value)
    blocks = model.anatomy.blocks
    base = next(index for index, block in enumerate(blocks) if block.name == merged.base.name)
    keep_blocks(model.network, [index for index in range(len(blocks)) if index == base or index not in groups])


def tensors(*values):
    return [torch.tensor(value) for value in values]


# --- the formulas


def test_formulas_by_hand():
    members = tensors([1.0, 4.0], [3.0, 4.0], [8.0, -2.0])
    assert average(members).tolist() == [4.0, 2.0]
    # 1 + (3 − 1) + (8 − 1) = 10 and 4 + 0 + (−2 − 4) = −2
    assert collapse(members).tolist() == [10.0, -2.0]
    assert average(members).dtype == collapse(members).dtype == torch.float32


def test_one_tensor_stays_itself():
    one = torch.randn(3, 5)
    assert torch.equal(average([one]), one)
    assert torch.equal(collapse([one]), one)


def test_zeros_that_all_share_stay_zeros():
    members = [torch.randn(7, 11) * (torch.rand(7, 11) > 0.5) for _ in range(3)]
    shared = torch.stack([member == 0 for member in members]).all(dim=0)
    assert shared.any()
    for merged in (average(members), collapse(members)):
        assert torch.equal(merged == 0, shared)


# --- ridge


def reference(features, residuals, damping, with_offset):
    """The same minimum by least squares on stacked rows, float64."""
    shift = features.mean(dim=0) if with_offset else torch.zeros(features.shape[1], dtype=torch.float64)
    centred = features - shift
    offset = residuals.mean(dim=0) if with_offset else torch.zeros(residuals.shape[1])
    scale = damping * centred.square().sum(dim=0).mean()
    rows = torch.cat([centred, scale.sqrt() * torch.eye(features.shape[1], dtype=features.dtype)])
    wanted = torch.cat([residuals - offset, torch.zeros(features.shape[1], residuals.shape[1])])
    change = torch.linalg.lstsq(rows, wanted).solution.T
    return change, offset - change @ shift


@pytest.mark.parametrize("bias", [True, False])
def test_regression_equals_stacked_least_squares(bias):
    torch.manual_seed(0)
    features, residuals = torch.randn(97, 13, dtype=torch.float64) + 3, torch.randn(97, 5, dtype=torch.float64)
    sums = Regression(matrix_of(torch.nn.Linear(13, 5, bias=bias)))
    for rows in (slice(0, 40), slice(40, 41), slice(41, 97)):
        sums.add(features[rows], residuals[rows])
    change, offset, error = sums.solve(0.03)
    expected, at = reference(features, residuals, 0.03, bias)
    torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-9)
    left = residuals - features @ expected.T - (at if bias else 0)
    assert error == pytest.approx(float(left.square().sum() / 97), rel=1e-9)
    if bias:
        torch.testing.assert_close(offset, at, rtol=1e-9, atol=1e-9)
    else:
        assert offset is None


def matrix_of(linear):
    return Matrix("of a test", linear)


def test_ridge_under_a_mask_equals_solving_row_by_row():
    torch.manual_seed(1)
    features = torch.randn(60, 17, dtype=torch.float64) * torch.logspace(-1, 1, 17)
    gram, cross = features.T @ features, torch.randn(6, 17, dtype=torch.float64)
    kept = torch.rand(6, 17) > 0.5
    kept[2] = False
    found = ridge(gram, cross, 1e-3, kept)
    assert (found[~kept] == 0).all()
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(17)
    for row, mask in enumerate(kept):
        expected = torch.linalg.solve(damped[mask][:, mask], cross[row, mask])
        torch.testing.assert_close(found[row, mask], expected, rtol=1e-7, atol=1e-9)


def test_ridge_of_nothing_is_nothing():
    assert torch.equal(ridge(torch.zeros(3, 3), torch.zeros(2, 3), 0.01), torch.zeros(2, 3))


# --- whole blocks


@families
def test_weights_of_neighbours_become_one(tiny_model, family):
    model = tiny_model(family)
    blocks = model.anatomy.blocks[1:3]
    own = [dict(block.module.named_parameters()) for block in blocks]
    merged = merge_weights(blocks, average)
    assert merged.base is blocks[0]
    assert len(merged.weights) == len(own[0])
    for name, parameter in own[0].items():
        torch.testing.assert_close(merged.weights[parameter], (parameter.data + own[1][name].data) / 2)


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_position_biases_stay_where_they_are(tiny_model, family):
    first = tiny_model(family).anatomy.blocks
    merged = merge_weights(first[:2], collapse)
    assert not any(parameter is first[0].attention.position_bias.weight for parameter in merged.weights)
    assert len(merged.weights) == len(dict(first[1].module.named_parameters()))


def test_what_keeps_blocks_from_being_merged_is_named(tiny_model):
    model = tiny_model()
    keep_feed_forward(model.anatomy.blocks[1], torch.arange(40))
    reason = hindrance(model.anatomy.blocks[:2])
    assert "(48,) in block.0" not in reason
    assert "block.0 and block.1" in reason
    assert "40" in reason
    with pytest.raises(ValueError, match=r"block\.0 and block\.1"):
        merge_weights(model.anatomy.blocks[:2], average)
    modern = tiny_model("modernbert")
    assert "only one of them has attn_norm" in hindrance(modern.anatomy.blocks[:2])


# --- least squares


@pytest.mark.parametrize("family", NORMS_FIRST)
@pytest.mark.parametrize("silent", [0, 1])
def test_a_block_beside_one_that_does_nothing_is_fitted_exactly(tiny_model, family, silent):
    """Where norms come first, a block whose outputs are zero is the identity: the other one alone is the answer."""
    model = tiny_model(family)
    pair = model.anatomy.blocks[:2]
    silence(pair[silent])
    before, batches = outputs(model), batches_of(model)
    merged = fit_block(model.network, batches, pair)
    assert merged.base is pair[1 - silent]
    assert merged.error == 0.0
    assert all(torch.equal(parameter.data, value) for parameter, value in merged.weights.items())
    apply(model, {0, 1}, merged)
    for now, old in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(now, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox"])
def test_a_block_that_adds_a_constant_goes_into_the_other_ones_bias(tiny_model, family):
    model = tiny_model(family)
    pair = model.anatomy.blocks[:2]
    silence(pair[1])
    constant = torch.randn(32)
    pair[1].feed_forward.down.bias.copy_(constant)
    before, batches = outputs(model), batches_of(model)
    down = pair[0].feed_forward.down
    bias = down.bias.clone()
    merged = fit_block(model.network, batches, pair)
    assert merged.base is pair[0]
    assert merged.error < 1e-6 * constant.square().sum()
    torch.testing.assert_close(merged.weights[down.module.bias], bias + constant, rtol=1e-5, atol=1e-5)
    apply(model, {0, 1}, merged)
    for now, old in zip(outputs(model), before, strict=True):
        torch.testing.assert_close(now, old, rtol=1e-5, atol=1e-4)


@families
def test_the_norm_that_closes_a_block_is_found(tiny_model, family):
    model = tiny_model(family)
    with torch.no_grad(), traced(model.anatomy.blocks, insides=True) as traces:
        model.network(**batches_of(model)[0][0])
    for block, trace in zip(model.anatomy.blocks, traces, strict=True):
        assert bool(trace.closing) == (family in NORMS_LAST)
        assert len(trace.written) == len(block.parts)
        again = block.module.get_submodule(trace.closing)(trace.end) if trace.closing else trace.end
        assert torch.equal(again, trace.left)


@families
def test_fitting_comes_closer_than_dropping(tiny_model, family):
    """On the states it was fitted to, the fitted block is nearer to the pair than either block alone."""
    model = tiny_model(family)
    batches, pair = batches_of(model), model.anatomy.blocks[1:3]
    merged = fit_block(model.network, batches, pair, damping=1e-6)
    alone = [distance_to_pair(model, pair, base, {}) for base in pair]
    fitted = distance_to_pair(model, pair, merged.base, merged.weights)
    assert fitted < 0.9 * min(alone)


def distance_to_pair(model, pair, base, weights):
    """Mean squared distance between the pair's outputs and one block's, tokens of the texts only."""
    total, tokens = 0.0, 0
    for batch in batches_of(model):
        with torch.no_grad(), without_cache(model.network):
            with traced(pair) as seen:
                model.network(**batch[0])
            call = seen[pair.index(base)].call
            with replaced(weights), traced([base]) as (mine,):
                call_with(base, call, seen[0].entered)
        inside = own_tokens(model.anatomy, base, batch)
        total += float((seen[1].left - mine.left)[inside].square().sum())
        tokens += int(inside.sum())
    return total / tokens


@families
def test_fitting_changes_nothing_by_itself_and_is_the_same_again(tiny_model, family):
    model = tiny_model(family)
    before = deepcopy(model.network.state_dict())
    found = [fit_block(model.network, batches_of(model), model.anatomy.blocks[1:3]) for _ in range(2)]
    after = model.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert found[0].base.name == found[1].base.name
    assert all(torch.equal(a, b) for a, b in zip(found[0].weights.values(), found[1].weights.values(), strict=True))


def test_pruned_weights_stay_zero_in_a_fit(tiny_model):
    for family in ("bert", "gpt2", "llama"):
        model = tiny_model(family)
        pair = model.anatomy.blocks[:2]
        pruned = [matrix.parameter for block in pair for matrix in block.matrices]
        for parameter in pruned:
            parameter.data[::2] = 0
        merged = fit_block(model.network, batches_of(model), pair, pruned)
        for parameter in pruned:
            if parameter in merged.weights:
                assert torch.equal(merged.weights[parameter] == 0, parameter.data == 0)
                assert not torch.equal(merged.weights[parameter], parameter.data)


def test_padding_does_not_count(tiny_model, monkeypatch):
    """One batch padded far more than needed gives the same fit; counting the padding would not."""
    model = tiny_model()
    (inputs, labels), *_ = batches_of(model)
    wider = {name: torch.nn.functional.pad(value, (0, 9)) for name, value in inputs.items()}

    def down_of(part):
        merged = fit_block(model.network, [(part, labels)], model.anatomy.blocks[:2])
        return merged.weights[merged.base.feed_forward.down.parameter]

    expected = down_of(inputs)
    torch.testing.assert_close(down_of(wider), expected, rtol=0, atol=1e-3)
    monkeypatch.setattr(merging, "own_tokens", lambda *_: torch.ones_like(wider["input_ids"], dtype=torch.bool))
    assert (down_of(wider) - expected).abs().max() > 0.02


def test_no_rows_are_an_error(tiny_model):
    model = tiny_model()
    with pytest.raises(ValueError, match="at least one batch"):
        fit_block(model.network, [], model.anatomy.blocks[:2])
