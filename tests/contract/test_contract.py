"""One suite over every method, family and task: what a method promises, whatever it is applied to."""

import itertools

import numpy as np
import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError
from moss_rlhf.files import read_json
from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.config import KEY
from moss_rlhf.model.grid import quantized_weights, round_to_int8
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.tasks.batching import batches_of, padding_of

TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "precision": "float32"}
METHODS = {
    "finetune": lambda model, rows: moss_rlhf.finetune(model, rows, rows[:8], **TRAINING),
    "narrow": lambda model, rows: moss_rlhf.narrow(model, rows, heads=0.5, feed_forward=0.34, rows=16),
    "prune": lambda model, rows: moss_rlhf.prune(model, sparsity=0.5),
    "quantize": lambda model, rows: moss_rlhf.quantize(model),
    "shorten": lambda model, rows: moss_rlhf.shorten(model, rows, remove=1, rows=16),
}
pytestmark = pytest.mark.usefixtures("one_thread")
ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
CASES = [
    (method, family, "text-classification")
    for method, family in itertools.product(METHODS, ENCODERS)
    if (method, family) != ("shorten", "albert")  # its layers share one block
]


def _changes_of(method, before, after):
    """Whether the method did what it says, and nothing else to the shapes."""
    shapes = {
        "narrow": (BlockShape(2, 32),) * len(before["shapes"]),
        "shorten": before["shapes"][:2],
    }.get(method, before["shapes"])
    assert after.anatomy.shapes == shapes
    linears = [matrix.weight for matrix in after.anatomy.matrices]
    if method == "prune":
        assert all(int((weight == 0).sum()) == weight.numel() // 2 for weight in linears)
    if method == "quantize":
        assert str(after.quantization) == "int8"
        for weight in quantized_weights(after.network).values():
            assert torch.equal(round_to_int8(weight.detach()), weight)
    if method in ("narrow", "shorten"):
        assert after.parameters < before["parameters"]
    if method == "finetune":
        assert not any(torch.equal(weight, old) for weight, old in zip(linears, before["linears"], strict=True))


def _batch(model, rows):
    tokens = [model.tokenizer(row["text"]) for row in rows[:6]]
    return batches_of(tokens, len(tokens), padding_of(model.tokenizer))[0]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_contract(case, tiny_model, rows, tmp_path):
    method, family, task = case
    model = tiny_model(family)
    assert model.task == task
    before = {
        "shapes": model.anatomy.shapes,
        "parameters": model.parameters,
        "linears": [matrix.weight.clone() for matrix in model.anatomy.matrices],
    }
    logits_before = TorchRuntime(model.network).run(_batch(model, rows))
    METHODS[method](model, rows)
    _changes_of(method, before, model)
    assert model.labels == ("negative", "positive")

    logits = TorchRuntime(model.network).run(_batch(model, rows))
    assert np.isfinite(logits).all()
    assert not np.array_equal(logits, logits_before)
    moss_rlhf.save(model, tmp_path / "saved")
    loaded = moss_rlhf.load(tmp_path / "saved")
    assert np.array_equal(TorchRuntime(loaded.network).run(_batch(model, rows)), logits)
    assert (loaded.labels, loaded.task, loaded.quantization) == (model.labels, task, model.quantization)
    assert loaded.anatomy.shapes == model.anatomy.shapes

    if loaded.quantization:
        with pytest.raises(ModelError, match="quantized already"):
            moss_rlhf.finetune(loaded, rows[:16], rows[:8], **TRAINING)
        return
    zeros = [parameter == 0 for parameter in loaded.pruned]
    assert len(zeros) == len(model.pruned)
    old = [parameter.detach().clone() for parameter in loaded.network.parameters()]
    moss_rlhf.finetune(loaded, rows[:16], rows[:8], **TRAINING)
    assert all(torch.equal(parameter == 0, zero) for parameter, zero in zip(loaded.pruned, zeros, strict=True))
    assert any(not torch.equal(value, new) for value, new in zip(old, loaded.network.parameters(), strict=True))


@pytest.mark.parametrize(("method", "family"), [case[:2] for case in CASES])
def test_plain_transformers_loads_it_or_says_who_can(method, family, tiny_model, rows, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = tiny_model(family)
    METHODS[method](model, rows)
    moss_rlhf.save(model, tmp_path / "saved")
    if "shapes" in read_json(tmp_path / "saved" / "config.json")[KEY]:
        assert method == "narrow"
        with pytest.raises(Exception, match=r"moss_rlhf\.load"):
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
        return
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    batch = _batch(model, rows)
    assert np.array_equal(TorchRuntime(network).run(batch), TorchRuntime(model.network).run(batch))


@pytest.mark.parametrize(
    ("methods", "family"),
    [
        (("prune", "narrow", "shorten", "quantize"), "bert"),
        *(
            pytest.param(methods, family, marks=pytest.mark.slow)
            for methods, family in itertools.product(
                [("finetune",), ("narrow", "shorten"), ("prune", "narrow", "shorten", "quantize")], ENCODERS
            )
            if (len(methods), family) != (4, "bert") and ("shorten" not in methods or family != "albert")
        ),
    ],
)
def test_exported_file_answers_as_the_network_does(methods, family, tiny_model, rows, tmp_path):
    """Float32 within rounding; int8 as PyTorch does when what enters each quantized layer is rounded to 8 bits."""
    model = tiny_model(family)
    for method in methods:
        METHODS[method](model, rows)
    moss_rlhf.export(model, tmp_path / "onnx")
    session = _session(tmp_path / "onnx" / "model.onnx")
    if model.quantization:
        for matrix in model.anatomy.matrices:
            matrix.module.register_forward_pre_hook(lambda _, inputs: (_rounded_to_8_bits(inputs[0]),))
    for count in (1, 5):  # batch and length are free
        batch = {name: values[:count] for name, values in _batch(model, rows).items()}
        expected = TorchRuntime(model.network).run(batch)
        # a value on the edge between two codes may fall to either side: one of 255 steps, in one place
        (exported,) = session.run(None, {value.name: batch[value.name] for value in session.get_inputs()})
        np.testing.assert_allclose(exported, expected, atol=0.01 if model.quantization else 1e-4)


def _session(place):
    import onnxruntime

    return onnxruntime.InferenceSession(str(place), providers=["CPUExecutionProvider"])


def _rounded_to_8_bits(values):
    """DynamicQuantizeLinear of the ONNX standard, and back."""
    low, high = values.min().clamp(max=0), values.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    return (((values / scale).round() + zero).clamp(0, 255) - zero) * scale


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("method", ["narrow", "shorten", "quantize"])
def test_a_quantized_model_is_not_reshaped(method, family, tiny_model, rows):
    model = tiny_model(family)
    moss_rlhf.quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        METHODS[method](model, rows)
