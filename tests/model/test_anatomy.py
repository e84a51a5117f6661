import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from moss_rlhf.errors import ModelError
from moss_rlhf.model import config as declared
from moss_rlhf.model.anatomy import FAMILIES, BlockShape, anatomy_of, family_of

SIZES = {"hidden": 36, "heads": 6, "blocks": 3, "feed_forward": 53}  # head size 6, where the family has no other
HEAD_SIZES = {"qwen3": 10}
KEY_VALUE_HEADS = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "gemma": 1}
GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5"}
families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_every_part_is_found_with_its_shape(tiny_model, family):
    anatomy = anatomy_of(tiny_model(family, **SIZES).network)
    two, size = FAMILIES[family].kind == "encoder-decoder", HEAD_SIZES.get(family, 6)
    own = (BlockShape(6, 53),) * (1 if family == "albert" else 3)
    assert anatomy.shapes == own + (BlockShape(6, 53, 6),) * 3 * two
    assert (anatomy.hidden_size, anatomy.repeats) == (36, 3 if family == "albert" else 1)
    inner, pairs = 6 * size, KEY_VALUE_HEADS.get(family, 6)
    for block in anatomy.blocks:
        for attention in block.attentions:
            shapes = [tuple(matrix.weight.shape) for matrix in attention.matrices]
            separate = [(inner, 36), (pairs * size, 36), (pairs * size, 36), (36, inner)]
            fused = [(3 * inner, 36), (36, inner)]
            assert shapes == (fused if family in ("gpt2", "gpt_neox", "modernbert") else separate)
            assert (attention.heads, attention.key_value_heads, attention.head_size) == (6, pairs, size)
            assert attention.units == {3: 3, 1: 6, 6: 6}[pairs]
            assert attention.unit_features * attention.units == inner
        ups = [(106, 36)] if family == "modernbert" else [(53, 36)] * (2 if family in GATED else 1)
        assert [tuple(matrix.weight.shape) for matrix in block.feed_forward.matrices] == [*ups, (36, 53)]


@families
def test_embeddings_blocks_and_head_hold_every_parameter_exactly_once(tiny_model, family):
    network = tiny_model(family).network
    anatomy = anatomy_of(network)
    in_blocks = [parameter for block in anatomy.blocks for parameter in block.module.parameters()]
    parts = [*(part for _, part in anatomy.embeddings), *in_blocks, *(part for _, part in anatomy.head)]
    assert sorted(map(id, parts)) == sorted(map(id, network.parameters()))
    names = dict(network.named_parameters())
    assert all(names[name] is part for name, part in anatomy.embeddings + anatomy.head)
    assert id(network.get_input_embeddings().weight) in {id(part) for _, part in anatomy.embeddings}
    above = ("pooler", "classifier", "head", "final_norm", "ln_f", "norm.", "final_layer_norm")
    assert all(any(word in name for word in above) for name, _ in anatomy.head)


@families
def test_the_matrices_are_all_that_the_blocks_multiply_with(tiny_model, family):
    network = tiny_model(family).network
    anatomy, names = anatomy_of(network), {id(part): name for name, part in network.named_parameters()}
    dense = {
        id(module)
        for block in anatomy.blocks
        for module in block.module.modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    }
    assert {id(matrix.module) for matrix in anatomy.matrices} == dense
    assert len(anatomy.matrices) == len(dense)
    assert [names[id(matrix.parameter)] for matrix in anatomy.matrices] == [matrix.name for matrix in anatomy.matrices]


@families
def test_a_matrix_multiplies_as_its_module_and_writes_through(tiny_model, family):
    for matrix in anatomy_of(tiny_model(family).network).matrices:
        inputs = torch.randn(2, matrix.in_features)
        expected = torch.nn.functional.linear(inputs, matrix.weight, matrix.bias)
        torch.testing.assert_close(matrix.module(inputs), expected, rtol=0, atol=1e-5)
        matrix.weight[1, 2] = 7.0
        assert matrix.parameter[(2, 1) if matrix.transposed else (1, 2)] == 7.0


def test_plain_and_gated_t5_are_told_apart(tiny_model):
    (plain, *_), (gated, *_) = (
        tiny_model("t5", feed_forward_proj=kind).anatomy.blocks for kind in ("relu", "gated-gelu")
    )
    assert [matrix.name.split(".")[-2] for matrix in plain.feed_forward.matrices] == ["wi", "wo"]
    assert [matrix.name.split(".")[-2] for matrix in gated.feed_forward.matrices] == ["wi_1", "wi_0", "wo"]


def test_deberta_projects_positions_too_where_it_does_not_share_the_keys(tiny_model):
    attention = tiny_model("deberta-v2", share_att_key=False).anatomy.blocks[0].attention
    names = [matrix.name.split(".")[-2] for matrix in attention.matrices]
    assert names == ["query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "dense"]


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].stacks[0].attention.fused])
def test_query_key_and_value_are_what_their_names_say(tiny_model, family):
    """Without keys and position biases every token attends to all alike; without values, attention makes their bias."""
    options = {"relative_attention": False} if family == "deberta-v2" else {}
    options |= {"use_sliding_window": False, "layer_types": None} if family == "qwen2" else {}
    model = tiny_model(family, blocks=1, **options)
    block = model.anatomy.blocks[0]
    _, key, value, *_ = block.attention.producers
    inputs = dict(model.tokenizer("the film was good", return_tensors="pt"))
    if FAMILIES[family].kind == "encoder-decoder":
        inputs["labels"] = inputs["input_ids"]
    states = []
    hook = block.attention.output.module.register_forward_pre_hook(lambda _, given: states.append(given[0].detach()))
    with torch.no_grad():
        for part in (key.weight, key.bias, *_biases_of_position(block)):
            if part is not None:
                part.zero_()
        model.network(**inputs)
        value.weight.zero_()
        model.network(**inputs)
    hook.remove()
    alike, nothing = states
    bias = torch.zeros(value.out_features) if value.bias is None else value.bias
    queries = block.attention.heads // block.attention.key_value_heads
    repeated = bias.unflatten(0, (-1, block.attention.head_size)).repeat_interleave(queries, dim=0).flatten()
    torch.testing.assert_close(nothing, repeated.expand_as(nothing), rtol=0, atol=1e-6)
    assert (alike - repeated).abs().max() > 1e-3
    if FAMILIES[family].kind != "decoder":
        torch.testing.assert_close(alike, alike[:, :1].expand_as(alike), rtol=0, atol=1e-6)


def _biases_of_position(block):
    return [] if block.attention.position_bias is None else [block.attention.position_bias.weight.data]


@families
def test_config_alone_says_the_same(tiny_checkpoint, tiny_model, family):
    options = {**SIZES, **({"num_decoder_layers": 2} if family in ("t5", "mt5") else {})}
    model = tiny_model(family, **options)
    config = declared.read_config(tiny_checkpoint(family, ("negative", "positive"), **options))
    first = model.anatomy.blocks[0]
    assert declared.block_shapes(config) == model.anatomy.shapes
    assert declared.hidden_size(config) == model.anatomy.hidden_size
    assert declared.head_size(config) == first.attention.head_size
    assert declared.queries_per_key(config) == first.attention.heads // first.attention.key_value_heads
    assert declared.is_gated(config) == (family in GATED or family == "modernbert")


@pytest.mark.parametrize(
    ("family", "key", "ask", "expected"),
    [
        ("t5", "num_decoder_layers", lambda config: len(declared.block_shapes(config)), 6),
        ("gpt2", "n_inner", lambda config: declared.block_shapes(config)[0].feed_forward, 4 * 32),
        ("mistral", "head_dim", declared.head_size, 32 // 4),
        ("llama", "num_key_value_heads", declared.queries_per_key, 1),
        ("mt5", "feed_forward_proj", declared.is_gated, True),
        ("t5", "feed_forward_proj", declared.is_gated, False),
    ],
)
def test_config_that_leaves_a_size_to_the_familys_default(family, key, ask, expected, tiny_checkpoint):
    config = declared.read_config(tiny_checkpoint(family))
    del config[key]
    assert ask(config) == expected


def test_an_unknown_family_is_told_the_known_ones():
    with pytest.raises(ModelError, match=r"'mamba' is not known.*albert, bart, bert, .*, t5, xlm-roberta"):
        family_of("mamba")


def test_an_architecture_of_a_family_that_lacks_a_stack_is_refused(tiny_model):
    from transformers import T5EncoderModel

    network = T5EncoderModel(tiny_model("t5").network.config)
    with pytest.raises(ModelError, match="t5: the decoder of this T5EncoderModel has not the expected parts"):
        anatomy_of(network)


def test_an_albert_of_several_blocks_is_refused(tiny_checkpoint):
    config = declared.read_config(tiny_checkpoint("albert")) | {"num_hidden_groups": 3}
    network = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**config))
    for look in (lambda: anatomy_of(network), lambda: declared.block_shapes(config)):
        with pytest.raises(ModelError, match="ALBERT of 3 groups of 1 blocks is not known"):
            look()
