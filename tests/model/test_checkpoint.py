import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification

from moss_rlhf import load, save
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward, keep_heads
from moss_rlhf.optimization import prune, quantize

TEXTS = ["the film was good", "bad", "what a lovely hotel , we all said so in the end", "电影很好。"]
families = pytest.mark.parametrize("family", sorted(FAMILIES))


def logits(network, tokenizer):
    with torch.no_grad():
        return network.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits


def plain(model):
    pass


def narrower_feed_forward(model):
    for block in model.anatomy.blocks:
        keep_feed_forward(block, torch.arange(1, 48, 2))


def fewer_heads(model):
    for block in model.anatomy.blocks:
        keep_heads(block, [1, 3])


def uneven(model):
    keep_heads(model.anatomy.blocks[0], [2])
    keep_feed_forward(model.anatomy.blocks[2], torch.tensor([0, 7, 9]))


def shortened(model):
    keep_blocks(model.network, [0, 2])


def pruned(model):
    prune(model, 0.5)


def quantized(model):
    quantize(model)


def everything(model):
    prune(model, 0.3)
    uneven(model)
    keep_blocks(model.network, [0, 2])
    model.pruned = [value for block in model.anatomy.blocks for value in (linear.weight for linear in block.linears)]
    quantize(model)


UNIFORM = [plain, narrower_feed_forward, shortened, pruned, quantized]
NOT_EXPRESSIBLE = [fewer_heads, uneven, everything]


def saved(tiny_model, family, change, place):
    """A model that was changed and then saved twice over, loaded in between."""
    model = tiny_model(family)
    change(model)
    save(model, place / "once")
    save(load(place / "once"), place / "twice")
    return model, place / "twice"


@families
@pytest.mark.parametrize("change", UNIFORM + NOT_EXPRESSIBLE)
def test_saved_and_loaded_gives_the_same_bits(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    again = load(place)
    assert torch.equal(logits(again.network, again.tokenizer), logits(model.network, model.tokenizer))
    assert again.anatomy.shapes == model.anatomy.shapes
    assert (again.labels, again.task, again.quantization) == (model.labels, model.task, model.quantization)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    names_again = {id(parameter): name for name, parameter in again.network.named_parameters()}
    assert {names_again[id(part)] for part in again.pruned} == {names[id(part)] for part in model.pruned}
    assert not [file.name for file in place.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


@families
@pytest.mark.parametrize("change", UNIFORM)
def test_plain_transformers_loads_a_uniform_result_with_the_same_bits(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    for auto_class in (AutoModelForSequenceClassification, type(model.network)):
        network = auto_class.from_pretrained(place)
        assert torch.equal(logits(network, model.tokenizer), logits(model.network, model.tokenizer))
        assert [network.config.id2label[index] for index in range(2)] == list(model.labels)


@families
@pytest.mark.parametrize("change", NOT_EXPRESSIBLE)
def test_plain_transformers_refuses_what_it_would_load_as_garbage(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    for auto_class in (AutoModel, AutoModelForSequenceClassification, type(model.network)):
        for options in ({}, {"ignore_mismatched_sizes": True}, {"use_safetensors": True}):
            with pytest.raises(Exception, match=r"use moss_rlhf\.load\(path\)"):
                auto_class.from_pretrained(place, **options)


def test_a_result_cut_back_to_uniform_is_plain_again(tiny_model, tmp_path):
    """A refusal must not outlive its reason."""
    model = tiny_model()
    keep_feed_forward(model.anatomy.blocks[0], torch.arange(16))
    save(model, tmp_path / "uneven")
    model = load(tmp_path / "uneven")
    for block in model.anatomy.blocks:
        keep_feed_forward(block, torch.arange(16))
    save(model, tmp_path / "even")
    config = json.loads((tmp_path / "even" / "config.json").read_text())
    assert config["intermediate_size"] == 16
    assert config["moss_rlhf"] == {"task": "text-classification"}
    assert "transformers_weights" not in config
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "even")
    assert torch.equal(logits(network, model.tokenizer), logits(model.network, model.tokenizer))


def test_config_declares_what_the_stock_one_can_not_say(tiny_model, tmp_path):
    model = tiny_model()
    uneven(model)
    save(model, tmp_path / "model")
    declared = json.loads((tmp_path / "model" / "config.json").read_text())["moss_rlhf"]
    assert declared["shapes"] == [[1, 48], [4, 48], [4, 3]]
    assert model.anatomy.shapes == (BlockShape(1, 48), BlockShape(4, 48), BlockShape(4, 3))


@pytest.mark.parametrize("change", [plain, uneven, pruned, quantized])
def test_a_loaded_checkpoint_trains_and_saves_again(tiny_model, tmp_path, change):
    _, place = saved(tiny_model, "bert", change, tmp_path)
    model = load(place)
    before = {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}
    batch = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    model.network(**batch, labels=torch.tensor([1, 0, 1, 1])).loss.backward()
    torch.optim.SGD(model.network.parameters(), lr=0.1).step()
    moved = [name for name, parameter in model.network.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(moved) > 0.9 * len(before)


def test_loading_does_not_move_the_callers_random_numbers(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(tmp_path / "model")
    assert torch.equal(torch.rand(2), expected)


def test_a_save_that_fails_leaves_what_stood_there(tiny_model, tmp_path):
    model = tiny_model()
    save(model, tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    prune(model, 0.5)
    with torch.no_grad():
        model.pruned[0].fill_(1.0)
    with pytest.raises(ModelError, match="holds no zero any more"):
        save(model, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_the_file_holds_each_tensor_once_and_nothing_else(tiny_model, tmp_path):
    model = tiny_model()
    save(model, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.parameters == model.nonzero


# --- a pretrained model and its new head ---------------------------------------------------------------------------


@families
def test_a_pretrained_network_is_taken_over_and_its_head_is_drawn(tiny_checkpoint, family):
    place = tiny_checkpoint(family)
    stored = load_file(place / "model.safetensors")
    torch.manual_seed(1)
    first = load(place, labels=["a", "b", "c"])
    torch.manual_seed(1)
    second = load(place, labels=["a", "b", "c"])
    torch.manual_seed(2)
    third = load(place, labels=["a", "b", "c"])
    base = first.network.base_model.state_dict()
    assert all(torch.equal(base[name], tensor) for name, tensor in stored.items() if name in base)
    assert all("pooler" in name for name in set(stored) - set(base))  # RoBERTa's classifier has none
    heads = [dict(model.anatomy.head) for model in (first, second, third)]
    matrices = [name for name, part in heads[0].items() if part.dim() == 2 and "pooler" not in name]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert matrices
    assert not any(torch.equal(heads[0][name], heads[2][name]) for name in matrices)
    assert first.labels == ("a", "b", "c")


@families
@pytest.mark.parametrize("labels", [["ham", "spam"], ["positive", "negative"], ["a", "b", "c"]])
def test_a_head_that_was_trained_for_other_labels_is_drawn_anew(tiny_checkpoint, family, labels):
    """As many labels or not, in another order or not: the old head's answers mean something else."""
    place = tiny_checkpoint(family, ("negative", "positive"))
    stored = load_file(place / "model.safetensors")
    model = load(place, labels=labels)
    parts = model.network.state_dict()
    heads = [name for name in stored if "classifier" in name and name.endswith("weight")]
    assert heads
    assert not any(torch.equal(parts[name], stored[name]) for name in heads)
    spread = torch.cat([parts[name].flatten() for name in heads]).std()
    assert 0.05 < spread < 0.15  # the config's initializer_range, 0.1
    assert all(torch.equal(parts[name], stored[name]) for name in stored if "classifier" not in name)


def test_a_head_that_was_trained_for_these_labels_is_kept(tiny_checkpoint):
    place = tiny_checkpoint("bert", ("negative", "positive"))
    stored = load_file(place / "model.safetensors")
    for model in (load(place), load(place, labels=["negative", "positive"])):
        assert all(torch.equal(stored[name], part) for name, part in model.network.state_dict().items())


def test_a_checkpoint_of_ours_serves_its_own_labels_only(tiny_model, tmp_path):
    save(tiny_model(), tmp_path / "model")
    assert load(tmp_path / "model", labels=["negative", "positive"]).labels == ("negative", "positive")
    with pytest.raises(ModelError, match="trained for the labels negative, positive; the data has ham, spam"):
        load(tmp_path / "model", labels=["ham", "spam"])


def test_positions_bound_the_longest_text(tiny_model):
    assert {tiny_model(family, positions=48).max_length for family in FAMILIES} == {48}
