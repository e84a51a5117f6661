"""The exported file against PyTorch, and what it looks like to someone with plain onnxruntime."""

import json
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from moss_rlhf.errors import MossError
from moss_rlhf.exporting import export
from moss_rlhf.exporting import onnx as exporting
from moss_rlhf.model.grid import quantized_weights
from moss_rlhf.optimization import quantize
from moss_rlhf.tasks.batching import batches_of, padding_of

SIZES = {"hidden": 32, "blocks": 2, "feed_forward": 40}


@pytest.fixture(scope="module")
def exported(tiny_model, tmp_path_factory):
    """{scheme: (model, file)} of one export, of a single text: an int8 file, and the float32 file it is made of."""
    place, model = tmp_path_factory.mktemp("export"), tiny_model("bert", **SIZES)
    quantize(model)
    padding = padding_of(model.tokenizer)
    batches = batches_of([model.tokenizer("the film")], 1, padding)
    exporting.export_onnx(model, place / "int8", batches, place / "float32" / "model.onnx")
    return {scheme: (model, place / scheme / "model.onnx") for scheme in ("float32", "int8")}


@pytest.fixture
def exporter_skipped(exported, monkeypatch):
    """PyTorch's exporter takes seconds; its file of the same network stands already."""
    _, file = exported["float32"]
    monkeypatch.setattr(exporting, "_export_float", lambda model, place, example: shutil.copy(file, place))


def _session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _batch(names, rows, length):
    generator = np.random.default_rng(rows)
    batch = {name: np.zeros((rows, length), dtype=np.int64) for name in names}
    batch["input_ids"] = generator.integers(5, 90, (rows, length))
    batch["attention_mask"] = (np.arange(length) < generator.integers(2, length + 1, (rows, 1))).astype(np.int64)
    return batch


def _torch_logits(model, batch):
    with torch.inference_mode():
        return model.network.eval()(**{name: torch.from_numpy(value) for name, value in batch.items()}).logits.numpy()


@pytest.mark.parametrize("shape", [(1, 3), (7, 19), (2, 64)])
@pytest.mark.parametrize(("scheme", "tolerance"), [("float32", 1e-4), ("int8", 0.15)])
def test_plain_onnxruntime_answers_as_pytorch_for_any_batch_and_length(exported, scheme, tolerance, shape):
    model, file = exported[scheme]
    session = _session(file)
    names = [value.name for value in session.get_inputs()]
    assert names == list(model.tokenizer.model_input_names)
    assert session.get_outputs()[0].name == "logits"
    batch = _batch(names, *shape)
    logits, expected = session.run(None, batch)[0], _torch_logits(model, batch)
    assert logits.shape == (shape[0], 2)
    assert np.linalg.norm(logits - expected) < tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("scheme", ["float32", "int8"])
def test_the_runtime_leaves_norms_apart_from_additions(exported, scheme, tmp_path):
    """The fused kernel takes four times as long."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(exported[scheme][1]), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    assert kinds.count("LayerNormalization") == 5
    assert not [kind for kind in kinds if "Skip" in kind or "EmbedLayer" in kind]


def test_one_file_holds_everything(exported):
    for _, file in exported.values():
        proto = onnx.load(file, load_external_data=False)
        assert all(value.data_location != onnx.TensorProto.EXTERNAL for value in proto.graph.initializer)
        assert not any(len(node.metadata_props) for node in proto.graph.node)  # stack traces of our machine
    beside = {part.name for part in exported["int8"][1].parent.iterdir()}
    assert beside == {"model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json"}


def test_the_int8_file_holds_the_checkpoint_s_grid_and_no_block_multiplies_in_float(exported):
    model, file = exported["int8"]
    graph = onnx.load(file).graph
    values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    assert [node.input[1] for node in graph.node if node.op_type == "MatMul" and node.input[1] in values] == []
    codes = {name: value for name, value in values.items() if value.dtype == np.int8}
    expected = [parameter.detach().numpy() for parameter in quantized_weights(model.network).values()]
    assert len(codes) == len(expected) == 6 * SIZES["blocks"] + 3
    for name, code in codes.items():
        weight = code.astype(np.float32) * values[name.replace("_codes", "_scale")]
        assert any(np.array_equal(weight, other) or np.array_equal(weight, other.T) for other in expected), name


def test_an_int8_file_is_smaller_by_three_bytes_a_weight_and_says_what_it_is(exported):
    sizes = {scheme: file.stat().st_size for scheme, (_, file) in exported.items()}
    weights = quantized_weights(exported["int8"][0].network).values()
    saved = sum(3 * weight.numel() - 4 * (weight.shape[0] + 1) for weight in weights)  # a scale each row, and names
    assert sizes["float32"] - sizes["int8"] == pytest.approx(saved, rel=0.3)
    config = json.loads((exported["int8"][1].parent / "config.json").read_text())
    assert config["moss_rlhf"] == {"task": "text-classification", "quantization": {"scheme": "int8"}}
    assert config["id2label"] == {"0": "negative", "1": "positive"}


def test_a_weight_that_is_not_the_checkpoint_s_fails_the_export(exported, exporter_skipped, tmp_path, monkeypatch):
    """One code of one weight is off by one on its way to the file."""
    model, _ = exported["int8"]
    honest = exporting.quantize_graph

    def tampered(proto, names, ranges):
        honest(proto, names, ranges)
        value = next(value for value in proto.graph.initializer if value.name.endswith("_codes"))
        codes = numpy_helper.to_array(value).copy()
        codes[0, 0] += 1 if codes[0, 0] < 100 else -1
        value.CopyFrom(numpy_helper.from_array(codes, value.name))

    monkeypatch.setattr(exporting, "quantize_graph", tampered)
    with pytest.raises(MossError, match=r"the int8 file does not hold .*weight as the checkpoint has it"):
        export(model, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []  # whole or not at all
    monkeypatch.setattr(exporting, "quantize_graph", honest)
    facts = export(model, tmp_path / "onnx")
    assert facts["file"] == "onnx/model.onnx"
    assert 0 < facts["difference_to_pytorch"] < 0.15


def test_a_network_that_changed_since_fails_the_export(exported, exporter_skipped, tiny_model, tmp_path):
    """The float file of one network, the weights of another."""
    other = tiny_model("bert", **SIZES)
    with torch.no_grad():
        other.network.classifier.bias.add_(1)
    with pytest.raises(MossError, match="answers differently from PyTorch"):
        export(other, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer", [0, np.nan, -1])
def test_a_file_that_answers_otherwise_fails(exported, monkeypatch, answer):
    model, file = exported["int8"]
    run = exporting.OnnxRuntime.run
    monkeypatch.setattr(exporting.OnnxRuntime, "run", lambda runtime, batch: answer * run(runtime, batch))
    batch = _batch(model.tokenizer.model_input_names, 3, 9)
    with pytest.raises(MossError, match="answers differently from PyTorch: relative difference"):
        exporting._verify_logits(model, file, [batch], 0.5)


def test_exporting_leaves_the_model_as_it_was(exported):
    model, _ = exported["float32"]
    assert model.network.config._attn_implementation == "sdpa"
