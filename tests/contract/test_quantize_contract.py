"""Quantization, by every scheme and method, of every family: what it promises."""

import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.grid import quantized_tables, round_to_grid, scheme_grid

CASES = [
    {"scheme": "int8"},
    {"scheme": "int8", "method": "gptq"},
    {"scheme": "int8_static"},
    {"scheme": "int4", "group_size": 8},
    {"scheme": "int4", "group_size": 8, "method": "gptq", "activation_order": True},
    {"scheme": "int4", "group_size": 8, "method": "gptq", "sparsity": 0.5},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_every_weight_lies_on_the_grid_that_the_weights_alone_tell(family, options, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    if options["scheme"] == "int8_static" and model.anatomy.family.kind != "encoder":
        with pytest.raises(ModelError, match="for encoders"):
            moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
        return
    moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
    grid = scheme_grid(model.network, options["scheme"], options.get("group_size", 128))
    tables = quantized_tables(model.network) if options["scheme"] != "int4" else ()
    for matrix in (*model.anatomy.matrices, *tables):
        assert torch.equal(round_to_grid(matrix.weight, grid), matrix.weight), matrix.name
    if options.get("sparsity"):
        assert all(float((matrix.weight == 0).double().mean()) >= 0.49 for matrix in model.anatomy.matrices)
    moss_rlhf.save(model, tmp_path / "saved")
    loaded = moss_rlhf.load(tmp_path / "saved")
    assert loaded.quantization == model.quantization
    for old, new in zip(model.network.parameters(), loaded.network.parameters(), strict=True):
        assert torch.equal(old, new)
    with pytest.raises(ModelError, match="quantized already"):
        moss_rlhf.quantize(loaded)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "deberta-v2"])
def test_zeros_survive_gptq(family, tiny_model, rows_of):
    model = tiny_model(family)
    rows = rows_of(model.task)
    moss_rlhf.prune(model, rows, method="wanda", sparsity=0.5, rows=8)
    zeros = [matrix.weight == 0 for matrix in model.anatomy.matrices]
    moss_rlhf.quantize(model, rows, method="gptq", rows=8)
    for matrix, zero in zip(model.anatomy.matrices, zeros, strict=True):
        assert bool((matrix.weight[zero] == 0).all())


@pytest.mark.parametrize(
    "family",
    [
        "deberta-v2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "distilbert", "albert", "modernbert")),
    ],
)
@pytest.mark.parametrize("options", [{"scheme": "int8"}, {"scheme": "int8_static"}], ids=["dynamic", "static"])
def test_onnx_holds_what_was_quantized(family, options, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    moss_rlhf.quantize(model, rows_of(model.task), rows=16, **options)
    facts = moss_rlhf.export(model, tmp_path / "onnx", [row["text"] for row in rows_of(model.task)[:4]])
    assert facts["difference_to_pytorch"] < 0.1
