"""CTranslate2 answers as PyTorch does, for every family it serves, before and after surgery and rounding."""

import pytest
import torch

import moss_rlhf
from moss_rlhf.errors import ModelError, MossError
from moss_rlhf.model.runtime import TorchRuntime, open_ctranslate2
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads, keep_hidden
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

pytest.importorskip("ctranslate2")
from moss_rlhf.exporting.ctranslate2 import _SERVED, export_ctranslate2

# a tiny Marian's padding is not the last token, as every real one's is, and as the converter expects
FAMILIES = [family for family in _SERVED if family != "marian"]
# CTranslate2 reads Qwen2 without sliding windows
SIZES = {"qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3}}
TEXTS = [("the film was good and we would know", "we would know"), ("awful soup", "a lovely film")]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_and_int8_answer_as_pytorch(family, tiny_model, tmp_path):
    model = tiny_model(family, **SIZES.get(family, {}))
    assert export_ctranslate2(model, tmp_path / "float", TEXTS)["difference_to_pytorch"] < 1e-4
    moss_rlhf.quantize(model)
    assert export_ctranslate2(model, tmp_path / "int8", TEXTS)["difference_to_pytorch"] < 0.2


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2"])
def test_a_vocabulary_of_bytes_has_no_unknown_token(kind, tmp_path):
    sizes = {
        "t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2, "d_ff": 64},
        "bart": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    }
    model = moss_rlhf.from_scratch({"model_type": kind, **sizes[kind]}, [text for pair in TEXTS for text in pair] * 20)
    assert model.tokenizer.unk_token is None
    assert export_ctranslate2(model, tmp_path / kind, TEXTS)["difference_to_pytorch"] < 1e-4


@pytest.mark.parametrize("family", ["t5", "mt5", "bart"])
def test_translators_write_what_pytorch_writes(family, tiny_model, tmp_path):
    model = tiny_model(family)
    export_ctranslate2(model, tmp_path / "float", TEXTS)
    task, rows = TASKS["translation"], [{"source": source, "target": target} for source, target in TEXTS]
    ready = encoded(model, rows)
    here = task.write(TorchRuntime(model.network), ready, model.tokenizer, 12)
    assert task.write(open_ctranslate2(tmp_path / "float"), ready, model.tokenizer, 12) == here


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_heads_and_narrower_feed_forward(family, tiny_model, tmp_path):
    model = tiny_model(family, **SIZES.get(family, {}))
    for block in model.anatomy.blocks:
        for part in block.attentions:
            keep_heads(part, [0] if part.units == 2 else [0, 2])
        keep_feed_forward(block, torch.arange(32))
    assert export_ctranslate2(model, tmp_path / "narrow", TEXTS)["difference_to_pytorch"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_hidden_size_answers_as_pytorch_or_is_refused(family, tiny_model, tmp_path):
    model = tiny_model(family, **SIZES.get(family, {}))
    kept = torch.arange(model.anatomy.hidden_size - 8)
    keep_hidden(model.network, kept)
    moss_rlhf.quantize(model)
    if family == "gemma":
        with pytest.raises(ModelError, match="scales a gemma's embeddings by the root of the hidden size"):
            export_ctranslate2(model, tmp_path / "narrow", TEXTS)
        return
    facts = export_ctranslate2(model, tmp_path / "int8", TEXTS, tmp_path / "float")  # held in float32 first, at 1e-3
    assert facts["difference_to_pytorch"] < 0.2
    assert (tmp_path / "float" / "model.bin").exists()


def test_heads_that_differ_between_layers_are_refused(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    keep_heads(model.anatomy.blocks[0].attention, [0, 1])
    with pytest.raises(ModelError, match="one number of heads"):
        export_ctranslate2(model, tmp_path / "uneven", TEXTS)


def test_what_the_converter_misreads_is_found(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr("moss_rlhf.exporting.ctranslate2.has_windows", lambda config: False)
    with pytest.raises(MossError, match="answers differently"):
        export_ctranslate2(tiny_model("qwen2"), tmp_path / "windows", TEXTS)
