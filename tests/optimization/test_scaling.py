"""Scales move between layers and the network computes what it did; outliers cost less afterwards."""

import sys
from contextlib import ExitStack

import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError, UserError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.scaling import fold, smooth_activations
from moss_rlhf.tasks.loading import encoded

PRE_NORM = ["modernbert", "gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5"]
OTHERS = sorted(set(FAMILIES) - set(PRE_NORM))


def batches_of(model, rows_of, rows=16):
    return list(labelled_batches(model, calibration_rows(encoded(model, rows_of(model.task)), rows, 0)))


@torch.no_grad()
def answers(model, batches):
    """Logits at real tokens, or of whole texts, one after the other."""
    model.network.eval()
    found = []
    for inputs, labels in batches:
        logits = model.network(**inputs).logits.double()
        mask = labels != -100 if labels.dim() == 2 else torch.ones(len(labels), dtype=torch.bool)
        found.append(logits[mask].flatten())
    return torch.cat(found)


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def random_scales(folding, generator):
    """Spread over three orders of magnitude, the same for features that share a row."""
    each = torch.randn(max(folding.rows) + 1, generator=generator).mul(1.5).exp()
    return each[list(folding.rows)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("narrowed", [False, True], ids=["whole", "narrowed"])
def test_scales_of_any_size_leave_the_function_as_it_was(family, narrowed, tiny_model, rows_of):
    model = tiny_model(family)
    for block in model.anatomy.blocks if narrowed else ():
        for part in block.attentions:
            keep_heads(part, [0] if part.units == 2 else [0, 2])
        keep_feed_forward(block, torch.arange(0, 48, 2))
    batches, generator = batches_of(model, rows_of), torch.Generator().manual_seed(0)
    before, weights = answers(model, batches), [matrix.weight.clone() for matrix in model.anatomy.matrices]
    for block in model.anatomy.blocks:
        for folding in block.foldings:
            fold(folding, random_scales(folding, generator))
    assert distance(answers(model, batches), before) < 1e-5
    touched = [not torch.equal(new.weight, old) for new, old in zip(model.anatomy.matrices, weights, strict=True)]
    assert sum(touched) >= len(model.anatomy.blocks)


@pytest.mark.parametrize("family", PRE_NORM)
def test_every_norm_of_a_pre_norm_block_takes_scales(family, tiny_model):
    for block in tiny_model(family).anatomy.blocks:
        wanted = {"attention.input", "attention.value", "feed_forward.input"}
        wanted |= {"feed_forward.product"} if family not in ("gpt2", "gpt_neox", "opt") else set()
        wanted |= {"cross_attention.input", "cross_attention.value"} if block.cross_attention else set()
        wanted -= {"attention.input"} if family == "modernbert" and block.index == 0 else set()
        assert {folding.name for folding in block.foldings} == wanted


@pytest.mark.parametrize("family", OTHERS)
def test_the_norms_of_a_post_norm_block_are_left_alone(family, tiny_model):
    names = {folding.name for block in tiny_model(family).anatomy.blocks for folding in block.foldings}
    assert names <= {"attention.value", "cross_attention.value"}
    assert "attention.value" in names


def test_where_the_norms_of_opt_stand_is_told_by_its_config(tiny_model, rows_of):
    model = tiny_model("opt", do_layer_norm_before=False)
    batches = batches_of(model, rows_of)
    before = answers(model, batches)
    facts = smooth_activations(model, batches, 0.5)
    assert facts["smoothed"] == {"attention.value": 3}
    assert distance(answers(model, batches), before) < 1e-5


def test_a_t5_without_a_gate_has_no_product(tiny_model, rows_of):
    model = tiny_model("t5", feed_forward_proj="relu")
    batches = batches_of(model, rows_of)
    before = answers(model, batches)
    facts = smooth_activations(model, batches, 0.5)
    assert facts["smoothed"] == {
        **dict.fromkeys(("attention.input", "attention.value", "feed_forward.input"), 6),
        **dict.fromkeys(("cross_attention.input", "cross_attention.value"), 3),
    }
    # six matrices behind the nonlinearity, and the keys and values that read the encoder
    assert facts["not_rescaled"].startswith("12 of 48 matrices")
    assert distance(answers(model, batches), before) < 1e-5


def plant_outliers(model, times=50):
    """A few features of what enters the matrices become many times as large; the function stays."""
    for block in model.anatomy.blocks:
        for folding in block.foldings:
            if folding.name.endswith("input"):
                scales = torch.ones(len(folding.rows))
                scales[[1, 5]] = 1 / times
                fold(folding, scales)


def in_eight_bits(model, batches):
    """Answers with every input of a matrix rounded to 8 bits in the batch's range, as runtimes do."""

    def rounded(_, args):
        least, most = args[0].amin().clamp_max(0), args[0].amax().clamp_min(0)
        step = (most - least) / 255
        return ((args[0] / step).round() * step, *args[1:])

    with ExitStack() as stack:
        for matrix in model.anatomy.matrices:
            handle = matrix.module.register_forward_pre_hook(rounded)
            stack.callback(handle.remove)
        return answers(model, batches)


@pytest.mark.parametrize("family", PRE_NORM)
def test_outliers_cost_less_once_smoothed(family, tiny_model, rows_of):
    plain, rows = tiny_model(family), rows_of(tiny_model(family).task)
    batches = batches_of(plain, rows_of)
    expected = answers(plain, batches)
    errors = {}
    for smooth in (0.0, 0.5):
        model = tiny_model(family)
        plant_outliers(model)
        facts = moss_rlhf.quantize(model, rows, scheme="int8", smooth=smooth, rows=16)
        errors[smooth] = distance(in_eight_bits(model, batches), expected)
        assert ("smoothed" in facts) == bool(smooth)
    assert errors[0.5] < errors[0.0] / 2


def test_fixed_ranges_shrink_once_smoothed(tiny_model, rows_of):
    ranges = {}
    for smooth in (0.0, 0.5):
        model = tiny_model("modernbert")
        plant_outliers(model)
        moss_rlhf.quantize(model, rows_of(model.task), scheme="int8_static", smooth=smooth, rows=16)
        ranges[smooth] = {name: most - least for name, (least, most) in model.quantization.ranges.items()}
    behind_norms = [name for name in ranges[0.0] if "Wi" in name or ("Wqkv" in name and ".0." not in name)]
    assert behind_norms
    assert all(ranges[0.5][name] < ranges[0.0][name] / 3 for name in behind_norms)


@pytest.mark.parametrize("family", ["llama", "gemma", "gpt2", "t5"])  # two logits of a classifier are noise
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_awq_loses_less_than_rounding_where_features_differ(family, scheme, tiny_model, rows_of):
    plain, rows = tiny_model(family), rows_of(tiny_model(family).task)
    batches = batches_of(plain, rows_of)
    expected = answers(plain, batches)
    errors = {}
    for method in ("nearest", "awq"):
        model = tiny_model(family)
        plant_outliers(model)
        facts = moss_rlhf.quantize(model, rows, scheme=scheme, method=method, group_size=8, rows=16)
        errors[method] = distance(answers(model, batches), expected)
    assert facts["rounding_error_removed"] > 0.3
    assert errors["awq"] < errors["nearest"]


def test_pruned_zeros_stay(tiny_model, rows_of):
    model = tiny_model("llama")
    rows = rows_of(model.task)
    moss_rlhf.prune(model, rows, method="wanda", sparsity=0.5, rows=8)
    zeros = [matrix.weight == 0 for matrix in model.anatomy.matrices]
    moss_rlhf.quantize(model, rows, method="awq", scheme="int4", group_size=8, rows=8)
    assert all(
        bool((matrix.weight[zero] == 0).all()) for matrix, zero in zip(model.anatomy.matrices, zeros, strict=True)
    )


def test_smoothing_then_gptq(tiny_model, rows_of):
    model = tiny_model("opt")
    facts = moss_rlhf.quantize(model, rows_of(model.task), method="gptq", smooth=0.5, rows=8)
    assert facts["method"] == "gptq"
    assert facts["smoothed"] == {"attention.input": 3, "attention.value": 3, "feed_forward.input": 3}


FROM_ROWS = [
    {"method": "gptq"},
    {"method": "awq", "scheme": "int4", "group_size": 8},
    {"smooth": 0.5},
]


@pytest.mark.parametrize("options", FROM_ROWS, ids=lambda options: "-".join(map(str, options.values())))
def test_what_overflows_on_the_rows_is_named(options, tiny_model, rows_of):
    model = tiny_model("llama")
    with torch.no_grad():
        model.anatomy.blocks[1].feed_forward.ups[0].weight.mul_(1e38)
    with pytest.raises(ModelError, match=r"what enters model\.layers\.1\.mlp\.down_proj\.weight .* is not finite"):
        moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
    assert model.quantization is None


def test_too_few_tokens_and_a_singular_hessian_are_made_up_for_and_told(tiny_model, monkeypatch):
    rows, damping = [{"text": "good film"}], {}
    for start in (0.01, 0.0):
        for module in ("quantize", "fallbacks"):
            monkeypatch.setattr(sys.modules[f"moss_rlhf.optimization.{module}"], "DAMPING", start)
        model = tiny_model("llama")
        facts = moss_rlhf.quantize(model, rows, method="gptq")
        assert facts["too_few_tokens"].startswith(f"{len(model.anatomy.matrices)} matrices: 3 calibration tokens span")
        assert all(bool(matrix.weight.isfinite().all()) for matrix in model.anatomy.matrices)
        damping[start] = facts.get("damping_raised", {})
    assert damping[0.01] == {}
    assert set(damping[0.0]) <= {matrix.name for matrix in model.anatomy.matrices}
    assert damping[0.0]
    assert all(1e-7 < used <= 10 for used in damping[0.0].values())


BAD = {
    "smooth above 1": ({"smooth": 1.5}, r"quantize\.smooth: 1\.5 can't be used; it must be less than or equal to 1"),
    "smooth with int4": ({"smooth": 0.5, "scheme": "int4"}, "with int4 they stay in float"),
    "smooth with awq": ({"smooth": 0.5, "method": "awq"}, "Give one of them"),
    "an unknown method": (
        {"method": "hqq"},
        r"quantize\.method: 'hqq' can't be used; it must be 'nearest', 'gptq' or 'awq'",
    ),
    "awq with activation_order": ({"method": "awq", "activation_order": True}, "are for method gptq, not awq"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_that_do_not_go_together(options, message, tiny_model, rows_of):
    model = tiny_model("llama")
    before = [parameter.clone() for parameter in model.network.parameters()]
    with pytest.raises(UserError, match=message):
        moss_rlhf.quantize(model, rows_of(model.task), **options)
    assert all(torch.equal(new, old) for new, old in zip(model.network.parameters(), before, strict=True))


NEEDING_ROWS = [
    {"smooth": 0.5},
    {"method": "awq", "scheme": "int4", "group_size": 8},
    {"method": "gptq"},
    {"scheme": "int8_static"},
]


@pytest.mark.parametrize("options", NEEDING_ROWS, ids=lambda options: "-".join(map(str, options.values())))
def test_rows_are_asked_for_where_they_are_needed(options, tiny_model):
    model = tiny_model("modernbert")
    with pytest.raises(ModelError, match="give training rows"):
        moss_rlhf.quantize(model, **options)
    with pytest.raises(DataError, match="no rows to measure"):
        moss_rlhf.quantize(model, encoded(model, [{"text": "a", "label": "negative"}]).select([]), **options)
    assert model.quantization is None
