"""What vLLM is given: plain transformers and the library itself find the checkpoint's weights in it, exactly."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import moss_rlhf
from moss_rlhf.errors import MachineError, ModelError, MossError
from moss_rlhf.exporting import compressed_tensors as exporter
from moss_rlhf.exporting.compressed_tensors import export_compressed_tensors
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.batching import batches_of

pytest.importorskip("compressed_tensors")

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "gpt_neox"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "modernbert", "albert"]
SCHEMES = {"int4": "pack-quantized", "int8": "int-quantized"}
TEXTS = ["the film was good and we would know", "awful soup"]


def quantized(tiny_model, family, scheme, **sizes):
    model = tiny_model(family, **sizes)
    moss_rlhf.quantize(model, scheme=scheme, group_size=8)
    return model


def batches(model):
    tokens = [model.tokenizer(text) for text in TEXTS]
    return batches_of(tokens, 2, TASKS[model.task].padding(model.tokenizer))


@torch.no_grad()
def logits(network, model):
    inputs = {name: torch.from_numpy(values) for name, values in batches(model)[0].items()}
    return network.eval()(**inputs).logits


def settings(place):
    return json.loads((place / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", [*DECODERS, *ENCODERS])
def test_plain_transformers_answers_as_the_checkpoint(family, scheme, tiny_model, tmp_path):
    model = quantized(tiny_model, family, scheme)
    facts = moss_rlhf.export(model, tmp_path / "vllm", TEXTS, format="compressed-tensors")
    assert facts["format"] == settings(tmp_path / "vllm")["format"] == SCHEMES[scheme]
    assert facts["matrices_compared"] == len(model.anatomy.matrices)
    assert facts["difference_to_pytorch"] <= 1e-6
    if (family, scheme) == ("modernbert", "int4"):
        return  # transformers 5.23 stumbles while it makes one whose layers are packed; unpacked it was compared above
    network = TASKS[model.task].auto_class().from_pretrained(tmp_path / "vllm")  # as anyone would load it
    found, expected = logits(network, model), logits(model.network, model)
    bound = 1e-5 if scheme == "int4" else 0.1  # int8: the library rounds the activations too, as vLLM does
    assert float((found - expected).norm() / expected.norm()) < bound


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_four_bit_code_by_hand(family, tiny_model, tmp_path):
    model = quantized(tiny_model, family, "int4")
    export_compressed_tensors(model, tmp_path / "vllm", batches(model))
    stored = load_file(tmp_path / "vllm" / "model.safetensors")
    for matrix in model.anatomy.matrices:
        stem = matrix.name.removesuffix("weight")
        packed, scale = stored[f"{stem}weight_packed"], stored[f"{stem}weight_scale"]
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        codes = ((packed[:, :, None] >> shifts) & 15).flatten(1)[:, : matrix.in_features] - 8
        assert stored[f"{stem}weight_shape"].tolist() == list(matrix.weight.shape)
        assert f"{stem}weight" not in stored
        assert torch.equal(codes * scale.repeat_interleave(8, dim=1), matrix.weight)
        assert torch.equal(scale.bfloat16().float(), scale)  # vLLM holds scales in the network's type


def test_int8_by_hand(tiny_model, tmp_path):
    model = quantized(tiny_model, "llama", "int8")
    export_compressed_tensors(model, tmp_path / "vllm", batches(model))
    stored = load_file(tmp_path / "vllm" / "model.safetensors")
    for matrix in model.anatomy.matrices:
        codes, scale = stored[matrix.name], stored[f"{matrix.name}_scale"]
        assert codes.dtype == torch.int8
        assert scale.shape == (matrix.out_features, 1)
        assert torch.equal(codes * scale, matrix.weight)


def test_config_says_what_vllm_reads(tiny_model, tmp_path):
    model = quantized(tiny_model, "llama", "int4")
    export_compressed_tensors(model, tmp_path / "int4", batches(model))
    found, group = settings(tmp_path / "int4"), settings(tmp_path / "int4")["config_groups"]["group_0"]
    assert (found["quant_method"], found["quantization_status"]) == ("compressed-tensors", "compressed")
    assert found["ignore"] == ["lm_head"]
    assert group["targets"] == ["Linear"]
    assert {name: group["weights"][name] for name in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 8,
    }  # fmt: skip
    assert group["input_activations"] is None
    model = quantized(tiny_model, "bert", "int8")
    export_compressed_tensors(model, tmp_path / "int8", batches(model))
    found = settings(tmp_path / "int8")
    activations = found["config_groups"]["group_0"]["input_activations"]
    assert found["ignore"] == ["bert.pooler.dense", "classifier"]
    assert (activations["strategy"], activations["dynamic"], activations["symmetric"]) == ("token", True, True)
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert "moss_rlhf" not in config


def test_shards_hold_everything_once(tiny_model, tmp_path):
    model = quantized(tiny_model, "qwen2", "int4")  # its head is tied to the embeddings
    export_compressed_tensors(model, tmp_path / "whole", batches(model))
    export_compressed_tensors(model, tmp_path / "parts", batches(model), shard_bytes=10_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    parts = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert [part.name for part in parts] == sorted(set(index["weight_map"].values()))
    assert len(parts) > 3
    stored = {name: (file.name, tensor) for file in parts for name, tensor in load_file(file).items()}
    assert {name: file for name, (file, _) in stored.items()} == index["weight_map"]
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert set(whole) == set(stored)
    assert "lm_head.weight" not in whole
    assert all(torch.equal(tensor, stored[name][1]) for name, tensor in whole.items())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_a_model_whose_weights_are_on_disk_is_compared_by_them_alone(tiny_model, tmp_path):
    moss_rlhf.save(tiny_model("llama"), tmp_path / "model")
    model = moss_rlhf.load(tmp_path / "model", offload=True)
    moss_rlhf.quantize(model, scheme="int4", group_size=8)
    facts = export_compressed_tensors(model, tmp_path / "vllm", [])
    assert (facts["matrices_compared"], facts["difference_to_pytorch"]) == (len(model.anatomy.matrices), None)


def test_int4_goes_here_by_itself(tiny_model, tmp_path):
    model = quantized(tiny_model, "llama", "int4")
    assert moss_rlhf.export(model, tmp_path / "vllm", TEXTS)["format"] == "pack-quantized"


def test_uniformly_narrowed_models_are_held(tiny_model, tmp_path):
    model = tiny_model("qwen3")
    for block in model.anatomy.blocks:
        keep_heads(block.attention, [1])
        keep_feed_forward(block, torch.arange(32))
    moss_rlhf.quantize(model, scheme="int4", group_size=4)
    assert export_compressed_tensors(model, tmp_path / "vllm", batches(model))["difference_to_pytorch"] <= 1e-6


def test_what_it_can_not_hold(tiny_model, tmp_path):
    uneven = tiny_model("llama")
    keep_feed_forward(uneven.anatomy.blocks[0], torch.arange(32))
    moss_rlhf.quantize(uneven)
    static = tiny_model("bert")
    moss_rlhf.quantize(static, [{"text": TEXTS[0], "label": "negative"}], scheme="int8_static")
    faults = [
        (tiny_model("llama"), "the model is float32. Quantize to int4 or int8"),
        (static, "the model is int8_static. Quantize to int4 or int8"),
        (quantized(tiny_model, "t5", "int8"), "serves no encoder-decoder such as a t5"),
        (quantized(tiny_model, "gpt2", "int4"), "a gpt2 keeps its matrices transposed"),
        (uneven, "the stock config of a llama can't say this model's shapes"),
    ]
    for model, message in faults:
        with pytest.raises(ModelError, match=message):
            moss_rlhf.export(model, tmp_path / "vllm", TEXTS, format="compressed-tensors")
    assert not (tmp_path / "vllm").exists()


def test_formats_are_known_and_fit(tiny_model, tmp_path):
    with pytest.raises(ModelError, match=r"format must be auto, onnx, .* got 'gguf'"):
        moss_rlhf.export(tiny_model("llama"), tmp_path / "x", format="gguf")
    with pytest.raises(ModelError, match="ONNX files are for encoders"):
        moss_rlhf.export(tiny_model("llama"), tmp_path / "x", format="onnx")


def test_files_of_yours_are_not_overwritten(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MachineError, match="holds files of yours"):
        moss_rlhf.export(quantized(tiny_model, "llama", "int4"), tmp_path, TEXTS)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_library_says_which_extra_to_install(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(MachineError, match=r"pip install 'moss-rlhf\[vllm\]'"):
        moss_rlhf.export(quantized(tiny_model, "llama", "int4"), tmp_path / "vllm", TEXTS)


def test_weights_off_the_grid_are_found_and_nothing_is_left(tiny_model, tmp_path):
    model = quantized(tiny_model, "llama", "int4")
    with torch.no_grad():
        model.anatomy.blocks[1].feed_forward.down.weight[0, :2] *= 1.01
    with pytest.raises(MossError, match=r"does not hold model\.layers\.1\.mlp\.down_proj\.weight"):
        export_compressed_tensors(model, tmp_path / "vllm", batches(model))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_differently_is_found(tiny_model, tmp_path, monkeypatch):
    model = quantized(tiny_model, "llama", "int4")
    real = exporter._entries

    def spoilt(*arguments):
        for name, value in real(*arguments):
            yield name, value * 1.1 if name == "model.norm.weight" else value

    monkeypatch.setattr(exporter, "_entries", spoilt)
    with pytest.raises(MossError, match="answers differently from PyTorch"):
        export_compressed_tensors(model, tmp_path / "vllm", batches(model))


def test_what_was_exported_is_no_start_for_training(tiny_model, tmp_path):
    model = quantized(tiny_model, "llama", "int4")
    export_compressed_tensors(model, tmp_path / "vllm", batches(model))
    with pytest.raises(ModelError, match="is quantized already, by compressed-tensors"):
        moss_rlhf.load(tmp_path / "vllm", task="text-generation")
