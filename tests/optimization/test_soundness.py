"""Inf or nan anywhere in a network, and no method begins."""

import math

import pytest

import moss_rlhf
from moss_rlhf.errors import ModelError

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
