"""Quantization, by every scheme and method, of every family: what it promises."""

import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.grid import quantized_tables, round_to_grid, scheme_grid
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

CASES = [  # plain int8 is in test_contract
    {"scheme": "int8", "method": "gptq"},
    {"scheme": "int8_static"},
    {"scheme": "int4", "group_size": 8, "method": "gptq", "activation_order": True},
    {"scheme": "int4", "group_size": 8, "method": "gptq", "sparsity": 0.5},
    {"scheme": "int4", "group_size": 8, "method": "awq"},
]
PAIRS = [  # of what the others hold one by one
    {"scheme": "int4", "group_size": 8},
    {"scheme": "int8", "smooth": 0.5},
    {"scheme": "int8", "method": "gptq", "smooth": 0.5},
    {"scheme": "int8_static", "smooth": 0.5},
    {"scheme": "int8", "method": "awq"},
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [*CASES, *(pytest.param(options, marks=pytest.mark.slow) for options in PAIRS)],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_weight_lies_on_the_grid_that_the_weights_alone_tell(family, options, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    if options["scheme"] == "int8_static" and model.anatomy.family.kind != "encoder":
        with pytest.raises(ModelError, match="for encoders"):
            moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
        return
    moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
    grid = scheme_grid(options["scheme"], options.get("group_size", 128))
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
        "distilbert",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "deberta-v2", "albert", "modernbert")),
    ],
)
@pytest.mark.parametrize(
    "options",
    [pytest.param({"scheme": "int8"}, marks=pytest.mark.slow), {"scheme": "int8_static"}],
    ids=["dynamic", "static"],
)
def test_onnx_holds_what_was_quantized(family, options, tiny_model, rows_of, tmp_path):
    model = tiny_model(family)
    moss_rlhf.quantize(model, rows_of(model.task), rows=16, **options)
    facts = moss_rlhf.export(model, tmp_path / "onnx", [row["text"] for row in rows_of(model.task)[:4]])
    assert facts["difference_to_pytorch"] < 0.1


SCALED = [
    {"method": "awq", "scheme": "int4", "group_size": 8},
    {"smooth": 0.5},
    pytest.param({"method": "awq"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", SCALED, ids=lambda options: "-".join(map(str, options.values())))
def test_scaling_is_the_same_every_time_and_changes_answers_by_rounding_alone(family, options, tiny_model, rows_of):
    whole = tiny_model(family)
    found = []
    for _ in range(2):
        model = tiny_model(family)
        facts = moss_rlhf.quantize(model, rows_of(model.task), rows=8, seed=3, **options)
        found.append((facts, [parameter.clone() for parameter in model.network.parameters()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    rows = rows_of(whole.task)[:4]
    plain = tiny_model(family)
    moss_rlhf.quantize(plain, scheme=options.get("scheme", "int8"), group_size=options.get("group_size", 128))
    expected, rounded, scaled = (answers(each, rows) for each in (whole, plain, model))
    # that int8 rounds to ±64 or ±127, and int4 to ±7, bounds either; a wrong fold would be far beyond both
    assert distance(scaled, expected) < 2 * distance(rounded, expected) + 0.01


@torch.no_grad()
def answers(model, rows):
    network, batch = model.network.eval(), TASKS[model.task].collate(list(encoded(model, rows)), model.tokenizer)
    return network(**TASKS[model.task].inputs(network, batch)).logits.double()


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


VLLM = [name for name, family in FAMILIES.items() if family.kind != "encoder-decoder" and not family.transposed]


@pytest.mark.parametrize("family", VLLM)
@pytest.mark.parametrize(
    "options",
    [{"scheme": "int4", "group_size": 8, "method": "awq"}, {"scheme": "int8", "smooth": 0.5}],
    ids=["int4", "int8"],
)
def test_compressed_tensors_hold_what_was_quantized(family, options, tiny_model, rows_of, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = tiny_model(family)
    moss_rlhf.quantize(model, rows_of(model.task), rows=8, **options)
    texts = [row["text"] for row in rows_of("text-generation")[:4]]
    facts = moss_rlhf.export(model, tmp_path / "vllm", texts, format="compressed-tensors")
    assert facts["matrices_compared"] == len(model.anatomy.matrices)
    assert facts["difference_to_pytorch"] <= 1e-6
