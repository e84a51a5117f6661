"""Inf or nan anywhere in a network, and no method begins."""

import math

import pytest

import moss_rlhf
from moss_rlhf.errors import DataError, ModelError

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "wandaa"}, "prune: method 'wandaa' is not known; did you mean 'wanda'"),
        ({"scope": "globl"}, "prune: scope 'globl' is not known; did you mean 'global'"),
        ({"allocation": "owl"}, "prune: allocation 'owl' is not known"),
    ],
)
def test_prune_knows_its_words(options, message, tiny_model, rows):
    with pytest.raises(ModelError, match=message):
        moss_rlhf.prune(tiny_model("bert"), rows, sparsity=0.5, **options)


@pytest.mark.parametrize("count", [0, -3])
def test_nothing_is_measured_on_no_rows(count, tiny_model, rows):
    model = tiny_model("bert")
    for method in (
        lambda: moss_rlhf.prune(model, rows, sparsity=0.5, method="wanda", rows=count),
        lambda: moss_rlhf.quantize(model, rows, method="gptq", rows=count),
        lambda: moss_rlhf.sensitivity(model, rows, rows=count),
        lambda: moss_rlhf.narrow(model, rows, heads=0.5, rows=count),
    ):
        with pytest.raises(DataError, match=f"rows {count} would measure on nothing; give at least 1"):
            method()
