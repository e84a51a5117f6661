"""A model from texts and sizes: it reads, learns, saves, loads."""

import pytest
import torch

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.finetuning import pretrain
from moss_rlhf.finetuning.from_scratch import from_scratch, learned_tokenizer
from moss_rlhf.model.checkpoint import save_checkpoint
from moss_rlhf.tasks.loading import load

LABELS = ("negative", "positive")
SIZES = {
    "bert": {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    },
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
    "t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48},
}


@pytest.mark.parametrize("family", SIZES)
def test_from_texts_to_a_checkpoint(family, rows, tmp_path):
    texts = [row["text"] for row in rows]
    labels = LABELS if family == "bert" else None
    config = {"model_type": family, **SIZES[family]}
    model = from_scratch(config, texts, vocabulary=400, labels=labels, seed=3)
    again = from_scratch(config, texts, vocabulary=400, labels=labels, seed=3)
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, again.network.state_dict()[name]), name
    ids = model.tokenizer(texts[0])["input_ids"]
    assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == texts[0]
    settings = {"epochs": 4, "batch_size": 8, "max_length": 32, "learning_rate": 5e-3, "precision": "float32"}
    facts = pretrain(model, texts, **settings).facts
    assert facts["objective"] == {"bert": "masked", "gpt2": "causal", "t5": "spans"}[family]
    assert facts["after"]["perplexity"] < 0.8 * facts["before"]["perplexity"]
    save_checkpoint(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert loaded.tokenizer(texts[0])["input_ids"] == ids
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, loaded.network.state_dict()[name]), name


def test_chinese_characters_are_words():
    tokenizer = learned_tokenizer(["这个店很好", "味道不好"], "encoder", 100, 64)
    assert tokenizer.tokenize("味道很好") == ["味", "道", "很", "好"]


def test_what_is_refused(rows):
    texts = [row["text"] for row in rows]
    with pytest.raises(ModelError, match="an encoder classifies; give the class names"):
        from_scratch({"model_type": "bert"}, texts)
    with pytest.raises(ModelError, match="'brt' is not known"):
        from_scratch({"model_type": "brt"}, texts)
    with pytest.raises(DataError, match=r"from_scratch\.vocabulary: 10 tokens don't hold"):
        from_scratch({"model_type": "bert"}, texts, vocabulary=10, labels=LABELS)
