"""Every way in which a checkpoint can be broken is a ModelError that names the place; none loads as garbage."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moss_rlhf import load, save
from moss_rlhf.errors import ModelError
from moss_rlhf.model.config import KEY, block_shapes, read_config
from moss_rlhf.model.surgery import keep_heads

LABELS = ["negative", "positive"]


def edit_weights(change):
    def edit(place):
        file = place / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})

    return edit


def edit_config(**fields):
    def edit(place):
        file = place / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def cut_weights(keep):
    def edit(place):
        file = place / "model.safetensors"
        file.write_bytes(file.read_bytes()[:keep])

    return edit


def pickled_only(place):
    torch.save({}, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()


def rewrite(name, content):
    return lambda place: (place / name).write_text(content)


def remove(*names):
    return lambda place: [(place / name).unlink() for name in names]


def without(part):
    return edit_weights(lambda weights: {name: tensor for name, tensor in weights.items() if part not in name})


BROKEN = {
    "weights cut short": (cut_weights(-1000), "broken"),
    "header cut short": (cut_weights(50), "broken"),
    "weights empty": (cut_weights(0), "broken"),
    "no weights": (remove("model.safetensors"), "no safetensors file: give a folder"),
    "pickled weights": (pickled_only, "pickled, which can run code"),
    "a block is missing": (without("layer.1."), "layer.1."),
    "an embedding is missing": (without("word_embeddings"), "word_embeddings"),
    "wider than the weights": (edit_config(intermediate_size=64), "layer.0.intermediate"),
    "deeper than the weights": (edit_config(num_hidden_layers=5), "layer.3"),
    "shallower than the weights": (edit_config(num_hidden_layers=2), "layer.2"),
    "names of another layout": (
        edit_weights(lambda weights: {f"0.auto_model.{name}": tensor for name, tensor in weights.items()}),
        "don't belong together",
    ),
    "an unknown family": (edit_config(model_type="mamba"), "mamba"),
    "no config": (remove("config.json"), "no config.json"),
    "config cut short": (rewrite("config.json", '{"model_type": "be'), "config.json is broken"),
    "config of no model": (rewrite("config.json", "[]"), "no model_type"),
    "tokenizer cut short": (rewrite("tokenizer.json", '{"version": "1.0", "tru'), "tokenizer"),
    "tokenizer of another format": (rewrite("tokenizer.json", '{"version": "1.0"}'), "tokenizer"),
    "tokenizer missing": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokens without embeddings": (edit_config(vocab_size=150), "belong together"),
}


def broken(source, place, change):
    shutil.copytree(source, place)
    change(place)
    return place


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", ["pretrained", "trained", "ours"])
def test_a_broken_checkpoint_is_refused_with_its_place(tiny_checkpoint, tiny_model, tmp_path, kind, case):
    change, word = BROKEN[case]
    source = tiny_checkpoint("bert", None if kind == "pretrained" else LABELS)
    if kind == "ours":
        save(tiny_model(), source := tmp_path / "ours")
    place = broken(source, tmp_path / "broken", change)
    with pytest.raises(ModelError) as caught:
        load(place, labels=LABELS if kind == "pretrained" else None)
    assert word in str(caught.value)
    assert str(place) in str(caught.value) or case == "an unknown family"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "shapes", [[[4, 48]], [[4, 48], [4, 48], [4]], [[4, 48], [0, 48], [4, 48]], [[4, 48], [5, 48], [4, 48]], [1, 2, 3]]
)
def test_declared_shapes_that_can_not_be_built(tiny_model, tmp_path, shapes):
    save(tiny_model(), tmp_path / "model")
    edit_config(moss_rlhf={"shapes": shapes})(tmp_path / "model")
    with pytest.raises(ModelError, match=r"must be 3 pairs between \[1, 1\] and \[4, 48\]"):
        load(tmp_path / "model")


@pytest.mark.parametrize(
    ("family", "shapes", "rule"),
    [
        ("llama", [[4, 48], [3, 48], [4, 48]], r"3 pairs between \[1, 1\] and \[4, 48\]"),  # 2 queries a key
        ("bart", [[4, 48]] * 6, r"6 pairs between \[1, 1, 1\] and \[4, 48, 4\]"),
        ("bart", [[4, 48]] * 3 + [[4, 48, 5]] * 3, r"6 pairs between"),
        ("albert", [[4, 48]] * 3, r"1 pairs between"),
    ],
)
def test_declared_shapes_that_a_family_can_not_have(tiny_checkpoint, family, shapes, rule):
    config = read_config(tiny_checkpoint(family)) | {KEY: {"shapes": shapes}}
    with pytest.raises(ModelError, match=rule):
        block_shapes(config)


def test_declared_shapes_that_the_weights_have_not(tiny_model, tmp_path):
    model = tiny_model()
    for block in model.anatomy.blocks:
        keep_heads(block.attention, [1, 2])
    save(model, tmp_path / "model")
    edit_config(moss_rlhf={"shapes": [[2, 48], [2, 48], [3, 48]]})(tmp_path / "model")
    with pytest.raises(ModelError, match="don't belong together"):
        load(tmp_path / "model")


def test_zeros_that_came_alive_outside(tiny_model, tmp_path):
    model = tiny_model()
    model.pruned = [matrix.parameter for matrix in model.anatomy.matrices]
    for matrix in model.anatomy.matrices:
        matrix.weight[:, ::2] = 0
    save(model, tmp_path / "model")
    edit_weights(lambda weights: {name: tensor + 1 for name, tensor in weights.items()})(tmp_path / "model")
    with pytest.raises(ModelError, match="holds no zero any more"):
        load(tmp_path / "model")


def test_a_pruned_tensor_that_is_not_there(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "model")
    edit_config(moss_rlhf={"pruned": ["bert.nowhere.weight"]})(tmp_path / "model")
    with pytest.raises(ModelError, match=r"bert\.nowhere\.weight as pruned, but there is no such tensor"):
        load(tmp_path / "model")


def test_a_head_that_was_never_trained_needs_labels(tiny_checkpoint):
    with pytest.raises(ModelError, match=r"head was never trained.*labels=\["):
        load(tiny_checkpoint("bert"))


def test_a_missing_head_is_no_fault_but_a_missing_part_of_a_trained_one_is(tiny_checkpoint, tmp_path):
    trained = tiny_checkpoint("bert", LABELS)
    place = broken(trained, tmp_path / "broken", without("classifier"))
    assert load(place, labels=["ham", "spam"]).labels == ("ham", "spam")
    with pytest.raises(ModelError, match=r"classifier\.bias is missing"):
        load(place)
