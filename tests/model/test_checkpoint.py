import json
from math import sqrt

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from moss_rlhf import load, save
from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES, BlockShape
from moss_rlhf.model.checkpoint import load_checkpoint, load_pretrained
from moss_rlhf.model.config import block_shapes, head_size, hidden_size, queries_per_key, read_config
from moss_rlhf.model.grid import round_to_int8
from moss_rlhf.model.quantization import Quantization
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward, keep_heads, keep_hidden

TEXTS = ["the film was good", "bad", "what a lovely hotel , we all said so in the end", "电影很好。"]
AUTO_CLASSES = {
    "text-classification": AutoModelForSequenceClassification,
    "text-generation": AutoModelForCausalLM,
    "translation": AutoModelForSeq2SeqLM,
}
families = pytest.mark.parametrize("family", FAMILIES)
ENCODERS = [family for family in FAMILIES if FAMILIES[family].kind == "encoder"]
encoders = pytest.mark.parametrize("family", ENCODERS)
speaking = pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ENCODERS])


def logits(network, model):
    inputs = dict(model.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if model.task == "translation":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    with torch.no_grad():
        return network.eval()(**inputs).logits


def plain(model):
    pass


def narrower_feed_forward(model):
    for block in model.anatomy.blocks:
        keep_feed_forward(block, torch.arange(1, 48, 2))


def fewer_heads(model):
    for block in model.anatomy.blocks:
        for attention in block.attentions:
            keep_heads(attention, [1] if attention.units == 2 else [1, 3])


def narrower_hidden(model):
    keep_hidden(model.network, torch.tensor([index for index in range(32) if index % 4]))


def uneven(model):
    blocks = model.anatomy.blocks
    same = model.anatomy.family.same_heads
    for block in blocks[-3:] if same else blocks[:1]:
        for attention in block.attentions:
            keep_heads(attention, [attention.units - 1])
    keep_feed_forward(blocks[-1], torch.tensor([0, 7, 9]))


def shortened(model):
    keep_blocks(model.network, [index for index in range(len(model.anatomy.blocks)) if index % 3 != 1])


def pruned(model):
    for matrix in model.anatomy.matrices:
        matrix.weight[:, ::2] = 0
        model.pruned.append(matrix.parameter)


def quantized(model):
    for matrix in model.anatomy.matrices:
        matrix.weight[:] = round_to_int8(matrix.weight)
    model.quantization = Quantization("int8")


def everything(model):
    pruned(model)
    uneven(model)
    if model.anatomy.repeats == 1:
        shortened(model)
        left = {id(parameter) for parameter in model.network.parameters()}
        model.pruned = [parameter for parameter in model.pruned if id(parameter) in left]
    narrower_hidden(model)
    quantized(model)


CHANGES = [
    plain, narrower_feed_forward, shortened, pruned, quantized, fewer_heads, narrower_hidden, uneven, everything,
]  # fmt: skip
CASES = [(family, change) for family in FAMILIES for change in CHANGES if (family, change) != ("albert", shortened)]
FREE_HEADS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5")  # config.json gives the size of a head
FREE_HIDDEN = ("llama", "mistral", "qwen2", "qwen3", "mt5")  # … and nothing else hangs on the hidden size


def is_uniform(family, change):
    """Whether the family's own config.json can say what the change has made."""
    free = {fewer_heads: FREE_HEADS, narrower_hidden: FREE_HIDDEN, uneven: (), everything: ()}
    return family in free.get(change, FAMILIES)


def named(cases):
    return pytest.mark.parametrize(
        ("family", "change"), [pytest.param(*case, id=f"{case[0]}-{case[1].__name__}") for case in cases]
    )


def saved(tiny_model, family, change, place, **options):
    """A model that was changed and then saved twice over, loaded in between."""
    model = tiny_model(family, **options)
    change(model)
    save(model, place / "once")
    save(load_checkpoint(place / "once", AUTO_CLASSES[model.task]), place / "twice")
    return model, place / "twice"


@named(CASES)
def test_saved_and_loaded_gives_the_same_bits(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    again = load_checkpoint(place, AUTO_CLASSES[model.task])
    assert torch.equal(logits(again.network, again), logits(model.network, model))
    assert again.anatomy.shapes == model.anatomy.shapes
    assert (again.labels, again.task, again.quantization) == (model.labels, model.task, model.quantization)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    names_again = {id(parameter): name for name, parameter in again.network.named_parameters()}
    assert names_again.values() == names.values() or sorted(names_again.values()) == sorted(names.values())
    assert {names_again[id(part)] for part in again.pruned} == {names[id(part)] for part in model.pruned}
    assert {name: part.requires_grad for name, part in again.network.named_parameters()} == {
        name: part.requires_grad for name, part in model.network.named_parameters()
    }
    buffers = dict(model.network.named_buffers())
    assert all(torch.equal(values, buffers[name]) for name, values in again.network.named_buffers())
    assert not [file.name for file in place.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]


@named(CASES)
def test_config_of_the_result_says_what_the_network_is(tiny_model, tmp_path, family, change):
    """Before its weights are touched: a forecast stands on it."""
    model, place = saved(tiny_model, family, change, tmp_path)
    config, attention = read_config(place), model.anatomy.blocks[0].attention
    assert block_shapes(config) == model.anatomy.shapes
    assert hidden_size(config) == model.anatomy.hidden_size
    assert head_size(config) == attention.head_size
    if change is not uneven and change is not everything:
        assert queries_per_key(config) == attention.heads // attention.key_value_heads


@named([case for case in CASES if is_uniform(*case)])
def test_plain_transformers_loads_a_uniform_result_with_the_same_bits(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    for auto_class in (AUTO_CLASSES[model.task], type(model.network)):
        network = auto_class.from_pretrained(place)
        assert torch.equal(logits(network, model), logits(model.network, model))
        assert tuple(network.config.id2label.values()) == model.labels


@named([case for case in CASES if not is_uniform(*case)])
def test_plain_transformers_refuses_what_it_would_load_as_garbage(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    for auto_class in (AutoModel, AUTO_CLASSES[model.task], type(model.network)):
        for options in ({}, {"ignore_mismatched_sizes": True}, {"use_safetensors": True}):
            with pytest.raises(Exception, match=r"use moss_rlhf\.load\(path\)"):
                auto_class.from_pretrained(place, **options)


VARIANTS = [
    ("deberta-v2", {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2}),
    ("deberta-v2", {"relative_attention": False, "conv_kernel_size": 0, "embedding_size": 20}),
    ("roberta", {"type_vocab_size": 1}),
    ("gpt2", {"n_inner": None}),
    ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"head_dim": None, "sliding_window": 4}),
    ("t5", {"feed_forward_proj": "relu", "num_decoder_layers": 2}),
    ("bart", {"decoder_layers": 1, "decoder_ffn_dim": 50, "decoder_attention_heads": 4, "scale_embedding": True}),
    ("marian", {"share_encoder_decoder_embeddings": False}),
]


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_variants_of_a_family_too(tiny_model, tmp_path, family, options):
    def change(model):
        for block in model.anatomy.blocks:
            keep_feed_forward(block, torch.arange(1, 48, 2))
        fewer_heads(model)
        narrower_hidden(model)

    for index, each in enumerate((plain, change)):
        model, place = saved(tiny_model, family, each, tmp_path / str(index), **options)
        again = load_checkpoint(place, AUTO_CLASSES[model.task])
        assert torch.equal(logits(again.network, again), logits(model.network, model))
        assert block_shapes(read_config(place)) == again.anatomy.shapes == model.anatomy.shapes
        assert again.parameters == model.parameters


# --- what only some families have ----------------------------------------------------------------------------------


TIED = ("gpt2", "opt", "qwen2", "gemma", "t5", "mt5", "bart", "marian")


@speaking
@pytest.mark.parametrize("change", [plain, uneven, narrower_hidden])
def test_tied_embeddings_stay_tied_and_others_apart(tiny_model, tmp_path, family, change):
    model, place = saved(tiny_model, family, change, tmp_path)
    again = load_checkpoint(place, AUTO_CLASSES[model.task])
    for network in (model.network, again.network):
        tied = network.get_output_embeddings().weight is network.get_input_embeddings().weight
        assert tied == (family in TIED)
    assert again.parameters == model.parameters


@pytest.mark.parametrize("change", [plain, uneven, narrower_hidden])
def test_a_t5_whose_head_has_weights_of_its_own_keeps_them(tiny_checkpoint, tmp_path, change):
    """Those of version 1.1: transformers' config says tied all the same, and goes by the weights in the file."""
    place = tiny_checkpoint("t5", ("negative", "positive"), tie_word_embeddings=False)
    network = AutoModelForSeq2SeqLM.from_pretrained(place)
    network.lm_head.weight = torch.nn.Parameter(network.shared.weight.detach().flip(0).clone())
    network.all_tied_weights_keys.pop("lm_head.weight", None)
    network.save_pretrained(tmp_path / "untied")
    for file in place.glob("tokenizer*"):
        (tmp_path / "untied" / file.name).write_bytes(file.read_bytes())
    model = load_pretrained(tmp_path / "untied", "translation", AutoModelForSeq2SeqLM, None)
    assert not model.network.config.scale_decoder_outputs
    change(model)
    save(model, tmp_path / "ours")
    again = load_checkpoint(tmp_path / "ours", AutoModelForSeq2SeqLM)
    assert torch.equal(logits(again.network, again), logits(model.network, model))
    assert not torch.equal(again.network.lm_head.weight, again.network.shared.weight)
    assert not again.network.config.scale_decoder_outputs


def test_a_plain_t5_still_scales_what_its_head_reads(tiny_model, tmp_path):
    model, place = saved(tiny_model, "t5", uneven, tmp_path)
    assert model.network.config.scale_decoder_outputs
    again = load_checkpoint(place, AutoModelForSeq2SeqLM)
    assert again.network.config.scale_decoder_outputs
    assert torch.equal(logits(again.network, again), logits(model.network, model))


def test_embeddings_are_scaled_by_the_hidden_size_they_were_trained_with(tiny_model, tmp_path):
    for family, auto_class in (("gemma", AutoModelForCausalLM), ("marian", AutoModelForSeq2SeqLM)):
        _, place = saved(tiny_model, family, narrower_hidden, tmp_path / family)
        again = load_checkpoint(place, auto_class).network
        scale = again.model.embed_tokens.embed_scale if family == "gemma" else again.model.encoder.embed_scale
        assert float(scale) == pytest.approx(sqrt(32))


def test_sinusoids_are_stored_as_they_are(tiny_model, tmp_path):
    """transformers would compute them anew, of any width, whatever training or rounding has made of them."""
    model = tiny_model("marian")
    table = model.network.model.encoder.embed_positions.weight
    sine = torch.sin(torch.arange(64, dtype=torch.float64))  # the first feature of all
    torch.testing.assert_close(table[:, 0].double(), sine, rtol=0, atol=1e-6)
    assert not table.requires_grad
    table.data += 0.1
    save(model, tmp_path / "moved")
    for network in (
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "moved"),
        load_checkpoint(tmp_path / "moved", AutoModelForSeq2SeqLM).network,
    ):
        assert torch.equal(network.model.encoder.embed_positions.weight, table)
        assert torch.equal(logits(network, model), logits(model.network, model))


@speaking
def test_how_a_checkpoint_generates_is_kept(tiny_model, tmp_path, family):
    model = tiny_model(family)
    model.network.generation_config.num_beams = 3
    model.network.generation_config.max_new_tokens = 5
    uneven(model)
    save(model, tmp_path / "ours")
    again = load_checkpoint(tmp_path / "ours", AUTO_CLASSES[model.task])
    assert again.network.generation_config.num_beams == 3
    inputs = model.tokenizer(TEXTS[0], return_tensors="pt")
    assert torch.equal(again.network.generate(**inputs), model.network.generate(**inputs))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_queries_of_the_last_key_value_head_can_go_singly(tiny_model, tmp_path, family):
    model = tiny_model(family)
    attention = model.anatomy.blocks[1].attention
    keep_heads(attention, [1])
    keep_heads(attention, [0])
    save(model, tmp_path / "ours")
    again = load_checkpoint(tmp_path / "ours", AutoModelForCausalLM)
    assert [shape.heads for shape in again.anatomy.shapes] == [4, 1, 4]
    assert torch.equal(logits(again.network, again), logits(model.network, model))


# --- one checkpoint ------------------------------------------------------------------------------------------------


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
    assert torch.equal(logits(network, model), logits(model.network, model))


def test_config_declares_what_the_stock_one_can_not_say(tiny_model, tmp_path):
    model = tiny_model()
    keep_heads(model.anatomy.blocks[0].attention, [2])
    keep_feed_forward(model.anatomy.blocks[2], torch.tensor([0, 7, 9]))
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
    pruned(model)
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


@encoders
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


@encoders
@pytest.mark.parametrize("labels", [["ham", "spam"], ["positive", "negative"], ["a", "b", "c"]])
def test_a_head_that_was_trained_for_other_labels_is_drawn_anew(tiny_checkpoint, family, labels):
    """As many labels or not, in another order or not: the old head's answers mean something else."""
    place = tiny_checkpoint(family, ("negative", "positive"))
    stored = load_file(place / "model.safetensors")
    model = load(place, labels=labels)
    parts = model.network.state_dict()
    below = f"{model.network.base_model_prefix}."
    heads = [name for name in stored if not name.startswith(below) and stored[name].dim() == 2]
    assert heads
    assert not any(torch.equal(parts[name], stored[name]) for name in heads)
    spread = torch.cat([parts[name].flatten() for name in heads]).std()
    assert 0.05 < spread < 0.15  # the config's initializer_range, 0.1
    assert all(torch.equal(parts[name], stored[name]) for name in stored if name.startswith(below))


def test_a_pretrained_part_of_the_head_is_kept(tiny_checkpoint, tmp_path):
    """ModernBERT's classifier reads what the dense layer of its pretraining makes."""
    source = tiny_checkpoint("modernbert")
    network = AutoModelForMaskedLM.from_pretrained(source)
    network.save_pretrained(tmp_path / "pretrained")
    for file in source.glob("tokenizer*"):
        (tmp_path / "pretrained" / file.name).write_bytes(file.read_bytes())
    model = load(tmp_path / "pretrained", labels=["a", "b", "c"])
    assert torch.equal(model.network.head.dense.weight, network.head.dense.weight)
    assert torch.equal(model.network.head.norm.weight, network.head.norm.weight)
    assert model.network.classifier.weight.std() > 0.05
    assert not model.network.classifier.bias.any()


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
