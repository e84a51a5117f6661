"""Inf or nan anywhere in a network, and no method begins."""

import math

import pytest

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError, UserError

METHODS = {
    "prune": lambda model, rows: moss_rlhf.prune(model, sparsity=0.5),
    "narrow": lambda model, rows: moss_rlhf.narrow(model, rows, heads=0.5),
    "shorten": lambda model, rows: moss_rlhf.shorten(model, rows, remove=1),
    "quantize": lambda model, rows: moss_rlhf.quantize(model),
    "sensitivity": moss_rlhf.sensitivity,
    "trim_vocabulary": moss_rlhf.trim_vocabulary,
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_norm_that_is_not_finite_is_refused_before_anything_changes(method, value, tiny_model, rows):
    model = tiny_model("bert")
    name, norm = [(name, one) for name, one in model.network.named_parameters() if "LayerNorm.bias" in name][-1]
    norm.data[2] = value
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    with pytest.raises(ModelError, match=f"{method}: {name}: weight is not finite: the checkpoint holds inf or nan"):
        METHODS[method](model, rows)
    after = model.network.state_dict()
    assert all(tensor.equal(after[key]) or key == name for key, tensor in before.items())


WRONG = [
    (moss_rlhf.prune, {"sparsity": 0.5, "method": "wandaa"}, r"prune\.method: 'wandaa' can't be used; .*'wanda'"),
    (moss_rlhf.prune, {"sparsity": 1.0}, r"prune\.sparsity: 1\.0 can't be used"),
    (moss_rlhf.prune, {"sparsity": 0.5, "pattern": "4:2"}, "pattern must be unstructured, n:m with n < m"),
    (moss_rlhf.prune, {"sparsity": 0.5, "method": "wanda", "scope": "global"}, "scope global is one threshold"),
    (moss_rlhf.prune, {"pattern": "2:4", "method": "wanda", "allocation": "outliers"}, "fixes every matrix's share"),
    (
        moss_rlhf.prune,
        {"sparsity": 0.97, "allocation": "outliers"},
        r"would leave \[0, 1\)\. Give a sparsity from 0.08",
    ),
    (moss_rlhf.prune, {"sparsity": 0.95, "allocation": "sensitivity"}, r"Give at most 0\.9"),
    (moss_rlhf.prune, {"sparsity": 0.0001}, "less than one of them. Give a larger one"),
    (moss_rlhf.prune, {"pattern": "3:7"}, "which the pattern does not fit"),
    (moss_rlhf.narrow, {"heads": "much"}, r"narrow\.heads: 'much' can't be used"),
    (
        moss_rlhf.narrow,
        {"heads": 0.01},
        r"heads 0\.01 would remove nothing of 4 heads, 48 neurons and a hidden size of 32",
    ),
    (moss_rlhf.narrow, {"heads": 0.5, "macs": 0.5}, "can't be met together"),
    (moss_rlhf.narrow, {}, "removes nothing"),
    (moss_rlhf.narrow, {"heads": 0.5, "rows": 2.5}, r"narrow\.rows: 2\.5 can't be used"),
    (moss_rlhf.shorten, {"how": "melt"}, r"shorten\.how: 'melt' can't be used"),
    (moss_rlhf.shorten, {"similarity": 0.5}, "Give a merge, or leave similarity out"),
    (moss_rlhf.shorten, {"stack": "decoder"}, "the model has no decoder, only one encoder"),
    (moss_rlhf.quantize, {"scheme": "int4", "group_size": 0}, r"quantize\.group_size: 0 can't be used"),
    (moss_rlhf.quantize, {"scheme": "int4", "group_size": -8}, r"quantize\.group_size: -8 can't be used"),
    (moss_rlhf.trim_vocabulary, {"characters": "x"}, r"trim_vocabulary\.characters: 'x' can't be used"),
]


@pytest.mark.parametrize(("method", "options", "message"), WRONG)
def test_an_option_that_can_not_be_used_changes_nothing(method, options, message, tiny_model, rows):
    model = tiny_model("bert")
    before = {key: tensor.clone() for key, tensor in model.network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        method(model, rows, **options)
    assert all(tensor.equal(before[key]) for key, tensor in model.network.state_dict().items())


def test_a_number_may_be_given_as_text(tiny_model, rows):
    assert moss_rlhf.prune(tiny_model("bert"), rows, sparsity="0.5")["sparsity"] == 0.5


def test_rows_without_labels_serve_what_measures_inputs_alone(tiny_model, rows):
    bare = [{"text": row["text"]} for row in rows]
    for method in ("wanda", "sparsegpt"):
        labelled, unlabelled = tiny_model("bert"), tiny_model("bert")
        moss_rlhf.prune(labelled, rows, sparsity=0.5, method=method)
        moss_rlhf.prune(unlabelled, bare, sparsity=0.5, method=method)
        pairs = zip(labelled.anatomy.matrices, unlabelled.anatomy.matrices, strict=True)
        assert all(one.weight.equal(other.weight) for one, other in pairs)
    with pytest.raises(DataError, match="they have no column 'label'"):
        moss_rlhf.narrow(tiny_model("bert"), bare, heads=0.5)


def test_no_rows_at_all(tiny_model):
    with pytest.raises(DataError, match="rows: there are none"):
        moss_rlhf.narrow(tiny_model("bert"), [], heads=0.5)


def test_sparsegpt_says_that_tokens_were_too_few(tiny_model, rows):
    facts = moss_rlhf.prune(tiny_model("bert"), rows[:1], sparsity=0.5, method="sparsegpt")
    assert "input directions; damping stands in for the rest" in facts["too_few_tokens"]
    assert "too_few_tokens" not in moss_rlhf.prune(tiny_model("bert"), rows, sparsity=0.5, method="sparsegpt")


@pytest.mark.parametrize("count", [0, -3])
def test_nothing_is_measured_on_no_rows(count, tiny_model, rows):
    model = tiny_model("bert")
    for method in (
        lambda: moss_rlhf.prune(model, rows, sparsity=0.5, method="wanda", rows=count),
        lambda: moss_rlhf.quantize(model, rows, method="gptq", rows=count),
        lambda: moss_rlhf.sensitivity(model, rows, rows=count),
        lambda: moss_rlhf.narrow(model, rows, heads=0.5, rows=count),
    ):
        with pytest.raises(UserError, match=rf"\.rows: {count} can't be used; it must be greater than or equal to 1"):
            method()
