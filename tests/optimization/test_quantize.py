import pytest
import torch

from moss_rlhf import quantize
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.grid import quantized_tables, quantized_weights, round_to_grid, scheme_grid
from moss_rlhf.model.quantization import Quantization


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_blocks_and_tables_lie_on_the_grid_and_the_rest_is_untouched(tiny_model, family):
    model, whole = tiny_model(family), tiny_model(family)
    facts = quantize(model)
    chosen, grid = quantized_weights(model.network), scheme_grid("int8")
    old = {matrix.name: matrix.weight for matrix in (*whole.anatomy.matrices, *quantized_tables(whole.network))}
    for matrix in (*model.anatomy.matrices, *quantized_tables(model.network)):
        assert torch.equal(matrix.weight, round_to_grid(old[matrix.name], grid)), matrix.name
    for (name, parameter), before in zip(model.network.named_parameters(), whole.network.parameters(), strict=True):
        assert name in chosen or torch.equal(parameter, before), name
    assert model.quantization == Quantization("int8")
    assert facts["matrices"] == len(chosen)


def test_the_error_is_that_of_rounding(tiny_model):
    model, whole = tiny_model(), tiny_model()
    facts = quantize(model)
    new, old = quantized_weights(model.network), quantized_weights(whole.network)
    errors = {name: ((new[name] - old[name]).norm() / old[name].norm()).item() for name in new}
    assert facts["relative_error"] == pytest.approx(sum(errors.values()) / len(errors))
    assert 0.002 < facts["relative_error"] < 0.02  # a step is max/64, its rounding error a step/√12
    assert list(facts["worst"]) == sorted(errors, key=lambda name: -errors[name])[:3]


def test_once_is_enough(tiny_model):
    model = tiny_model()
    quantize(model)
    before = [parameter.clone() for parameter in model.network.parameters()]
    with pytest.raises(ModelError, match=r"quantized already \(int8\)"):
        quantize(model)
    model.quantization = None  # as if nobody knew: the weights are a fixed point
    quantize(model)
    assert all(torch.equal(new, old) for new, old in zip(model.network.parameters(), before, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named_and_nothing_is_changed(tiny_model, value):
    model = tiny_model()
    with torch.no_grad():
        model.anatomy.blocks[1].attention.producers[1].weight[3, 3] = value
    before = [parameter.clone() for parameter in model.network.parameters()]
    with pytest.raises(ModelError, match=r"layer\.1\.attention\.self\.key\.weight: weight is not finite"):
        quantize(model)
    assert model.quantization is None
    pairs = zip(model.network.parameters(), before, strict=True)
    assert all(torch.equal(new.nan_to_num(7), old.nan_to_num(7)) for new, old in pairs)
