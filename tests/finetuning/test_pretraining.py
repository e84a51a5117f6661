"""Pretraining further: the body learns, the head is put back, every family, the same bits after an interruption."""

import numpy as np
import pytest
import torch

from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.finetuning.language_head import language_network
from moss_rlhf.finetuning.packing import frame_of, pack
from moss_rlhf.finetuning.pretraining import HeadFirst, pretrain
from moss_rlhf.finetuning.restoring import Restoring, Words, kind_for
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.checkpoint import load_checkpoint, save_checkpoint
from moss_rlhf.model.surgery import keep_blocks, keep_heads, keep_hidden
from moss_rlhf.optimization import prune
from moss_rlhf.strategy import SCHEDULES
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.language import IGNORED

ENCODERS = [name for name, family in FAMILIES.items() if family.kind == "encoder"]
SETTINGS = {"batch_size": 4, "max_length": 24, "learning_rate": 3e-3, "precision": "float32", "held_out": 0.2}


@pytest.fixture(scope="module")
def texts(rows):
    return [row["text"] for row in rows][:40]


def _with_sentinels(model):
    """A tiny T5 that knows <extra_id_0> … <extra_id_9>."""
    model.tokenizer.add_tokens([f"<extra_id_{index}>" for index in range(10)], special_tokens=True)
    model.network.resize_token_embeddings(len(model.tokenizer), mean_resizing=False)
    return model


def _weights(model):
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def _restoring(model, kind="masked", whole_words=True, share=0.15):
    two = "token_type_ids" in model.tokenizer.model_input_names
    words = Words.of(model.tokenizer)
    return Restoring(kind, words, share, whole_words, 0, model.tokenizer.pad_token_id, two)


# --- rows ----------------------------------------------------------------------------------------------------------


def test_packed_rows_hold_every_token_once_and_separators_between(tiny_model, texts):
    tokenizer = tiny_model().tokenizer
    rows = pack(texts, tokenizer, 10, True, True)
    expected = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]
    assert rows.ids.tolist() == expected  # 3 is [SEP]
    assert rows.lengths[:-1] == [10] * (len(rows) - 1)
    assert (rows.ids[rows.special] == 3).all() and rows.special.sum() == len(texts)
    assert frame_of(tokenizer) == frame_of(tokenizer).__class__((2,), (3,), (3,))


def test_unpacked_rows_begin_with_their_texts(tiny_model, texts):
    tokenizer = tiny_model().tokenizer
    rows = pack(texts, tokenizer, 6, False, False)
    whole = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = [ids[start : start + 6] for ids in whole for start in range(0, len(ids), 6)]
    assert [rows[index]["ids"].tolist() for index in range(len(rows))] == cut


def test_a_causal_model_gets_no_row_of_a_single_token(tiny_model):
    tokenizer = tiny_model().tokenizer
    texts = ["film", "a good film", "a good film good", "a", "good film"]
    rows = pack(texts, tokenizer, 3, False, False, shortest=2)
    words = [tokenizer.convert_ids_to_tokens(rows[index]["ids"].tolist()) for index in range(len(rows))]
    assert words == [["a", "good", "film"], ["a", "good", "film"], ["good", "film"]]
    model = tiny_model("gpt2")
    with pytest.raises(DataError, match="fewer than 2 tokens each"):
        pretrain(model, ["film", "good"] * 4, packed=False, epochs=1)


def test_words_of_several_pieces_begin_once(tiny_model):
    tokenizer = tiny_model().tokenizer
    rows = pack(["film zqx good"], tokenizer, 20, False, True)
    assert tokenizer.convert_ids_to_tokens(rows.ids) == ["film", "z", "##q", "##x", "good"]
    assert rows.starts.tolist() == [True, True, False, False, True]


def test_masks_are_a_function_of_seed_epoch_and_row(tiny_model, texts):
    model = tiny_model()
    task, rows = _restoring(model), pack(texts, model.tokenizer, 20, True, True)
    together = task.collate([rows[0], rows[1], rows[2]], 5)
    alone = task.collate([rows[1]], 5)
    assert torch.equal(together["input_ids"][1], alone["input_ids"][0])
    assert torch.equal(together["labels"][1], alone["labels"][0])
    assert not torch.equal(alone["labels"], task.collate([rows[1]], 6)["labels"])


def test_separators_and_frames_are_never_masked(tiny_model, texts):
    model = tiny_model()
    task, rows = _restoring(model, share=0.6), pack(texts, model.tokenizer, 20, True, True)
    batch = task.collate([rows[index] for index in range(len(rows))], 0)
    targets = batch["labels"][batch["labels"] != IGNORED]
    assert not np.isin(targets.numpy(), model.tokenizer.all_special_ids).any()
    assert (batch["input_ids"][:, 0] == 2).all()


def test_a_masked_loss_is_that_of_the_whole_head(tiny_model, texts):
    """The head is asked at the masked tokens alone; the loss is transformers' own."""
    for family in ENCODERS:
        model = tiny_model(family)
        network, _ = language_network(model, 0)
        task, rows = _restoring(model), pack(texts, model.tokenizer, 20, True, True)
        batch = task.collate([rows[0], rows[1]], 0)
        with torch.no_grad():
            expected = network(**batch).loss
            found = task(network, batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=family)


# --- what suits whom -----------------------------------------------------------------------------------------------


def test_objectives_by_family(tiny_model):
    words = {name: Words.of(tiny_model(name).tokenizer) for name in ("bert", "gpt2", "t5", "bart", "marian")}
    assert kind_for("auto", "encoder", words["bert"]) == "masked"
    assert kind_for("auto", "decoder", words["gpt2"]) == "causal"
    assert kind_for("auto", "encoder-decoder", words["bart"]) == "infilling"
    assert kind_for("auto", "encoder-decoder", Words.of(_with_sentinels(tiny_model("t5")).tokenizer)) == "spans"
    with pytest.raises(ModelError, match="spans needs sentinels such as <extra_id_0>"):
        kind_for("auto", "encoder-decoder", words["marian"])
    with pytest.raises(ModelError, match="'causal' does not suit an encoder; give masked, or auto"):
        kind_for("causal", "encoder", words["bert"])


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODERS)
def test_the_body_learns_and_the_head_is_put_back(family, tiny_model, texts):
    model = tiny_model(family)
    before, body = _weights(model), f"{model.network.base_model_prefix}."
    training = pretrain(model, texts, epochs=5, **SETTINGS)
    after = _weights(model)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if not name.startswith(body)} == set()
    assert all(name in moved for name in before if name.endswith("word_embeddings.weight"))
    for block in model.anatomy.blocks:
        assert block.attention.output.name in moved, block.name
    assert training.facts["head"] == "new"
    assert training.facts["after"]["perplexity"] < 0.8 * training.facts["before"]["perplexity"]
    assert training.facts["notes"][0].startswith("only 40 texts")


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_what_speaks_keeps_its_own_head(family, tiny_model, texts):
    model = tiny_model(family)
    model = _with_sentinels(model) if family == "t5" else model
    before = _weights(model)
    training = pretrain(model, texts, epochs=2, **SETTINGS)
    assert training.facts["head"] == "its own"
    assert training.facts["after"]["perplexity"] < 0.8 * training.facts["before"]["perplexity"]
    moved = {name for name, value in _weights(model).items() if not torch.equal(before[name], value)}
    assert all(block.attention.output.name in moved for block in model.anatomy.blocks)


def test_pruned_zeros_and_narrower_shapes_stay(tiny_model, texts):
    model = tiny_model()
    for block in model.anatomy.blocks:
        keep_heads(block.attention, [0, 2])
    keep_blocks(model.network, [0, 2])
    prune(model, sparsity=0.5)
    zeros = [parameter == 0 for parameter in model.pruned]
    pretrain(model, texts, **SETTINGS)
    for parameter, mask in zip(model.pruned, zeros, strict=True):
        assert (parameter[mask] == 0).all() and (parameter[~mask] != 0).any()
    assert [shape.heads for shape in model.anatomy.shapes] == [2, 2]


def test_a_checkpoint_that_holds_a_head_gives_it(tiny_model, texts, tmp_path):
    from transformers import AutoModelForMaskedLM

    model = tiny_model()
    network, origin = language_network(model, 0)
    assert origin == "new"
    with torch.no_grad():
        network.cls.predictions.bias.add_(0.5)
    network.save_pretrained(tmp_path / "mlm")
    assert isinstance(network, AutoModelForMaskedLM._model_mapping[type(network.config)])
    model.network.config.name_or_path = str(tmp_path / "mlm")
    again, origin = language_network(model, 1)
    assert origin == "the checkpoint"
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_the_adapted_model_saves_and_loads(tiny_model, texts, tmp_path):
    model = tiny_model()
    pretrain(model, texts, **SETTINGS)
    save_checkpoint(model, tmp_path / "model")
    loaded = load_checkpoint(tmp_path / "model", TASKS[model.task].auto_class())
    for name, value in _weights(model).items():
        assert torch.equal(value, loaded.network.state_dict()[name])


def test_a_new_head_trains_alone_at_first():
    table = HeadFirst((1.0, 1.0, 1.0), SCHEDULES["constant"], 0.0, 10, 3)
    assert table.trains(2) == (False, False, True)
    assert table.trains(3) == (True, True, True)


def _stopping(acting, step):
    def act(done):
        if done == step:
            raise RuntimeError("stopped by the test")

    return acting(act)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_resumed_is_never_stopped(family, tiny_model, texts, acting, tmp_path):
    settings = SETTINGS | {"epochs": 2, "save_every_seconds": 0.0, "max_length": 40, "batch_size": 8, "packed": False}

    def fresh():
        model = tiny_model(family, blocks=2)
        torch.manual_seed(1)  # of the new rows
        return _with_sentinels(model) if family == "t5" else model

    with pytest.raises(RuntimeError, match="stopped by the test"):
        pretrain(fresh(), texts, workspace=tmp_path, progress=_stopping(acting, 6), **settings)
    resumed, whole = fresh(), fresh()
    one = pretrain(resumed, texts, workspace=tmp_path, **settings)
    two = pretrain(whole, texts, **settings)
    assert one.history == two.history
    assert one.facts["after"] == two.facts["after"]
    for name, value in _weights(whole).items():
        assert torch.equal(value, resumed.network.state_dict()[name]), name


# --- wrong input ---------------------------------------------------------------------------------------------------


def test_too_few_texts_and_too_short_rows(tiny_model, texts):
    with pytest.raises(DataError, match="1 texts; give at least two"):
        pretrain(tiny_model(), texts[:1])
    with pytest.raises(RecipeError, match="max_length: 3 can't be used; it must be greater than or equal to 8"):
        pretrain(tiny_model(), texts, max_length=3)


def test_a_narrowed_hidden_size_has_no_head(tiny_model, texts):
    model = tiny_model()
    keep_hidden(model.network, torch.arange(24))
    with pytest.raises(ModelError, match="the hidden size was narrowed"):
        pretrain(model, texts)


def test_files_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("one text\n\nan\tother\n")
    assert read_texts(tmp_path / "a.txt") == ["one text", "an\tother"]
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two", "label": 1}\n')
    assert read_texts(tmp_path / "a.jsonl") == ["one", "two"]
    (tmp_path / "a.csv").write_text('label,text\n1,"one, two"\n0,three\n')
    assert read_texts(tmp_path / "a.csv") == ["one, two", "three"]
    assert read_texts(tmp_path / "a.csv", limit=1) == ["one, two"]
    (tmp_path / "e.csv").write_text("label,text\n1,one\n2\n")
    with pytest.raises(DataError, match="line 3: 1 cells where the header has 2"):
        read_texts(tmp_path / "e.csv")
    (tmp_path / "b.csv").write_text("label,review\n1,one\n")
    with pytest.raises(DataError, match=r"stages\.0\.pretrain\.texts: .* no column 'text', only label, review"):
        read_texts(tmp_path / "b.csv", "stages.0.pretrain.texts")
    with pytest.raises(DataError, match=r"stages\.0\.pretrain\.texts: there is no file"):
        read_texts(tmp_path / "c.txt", "stages.0.pretrain.texts")
    (tmp_path / "d.txt").write_text("\n")
    with pytest.raises(DataError, match=r"texts: .*(empty|holds no text)"):
        read_texts(tmp_path / "d.txt")
