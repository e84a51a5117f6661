import copy

import pytest
import torch

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.surgery import keep_blocks, keep_feed_forward, keep_heads, keep_hidden, only_blocks

SIZES = {"hidden": 36, "heads": 6, "blocks": 3, "feed_forward": 53}  # head size 6, qwen3's 10
TEXTS = ["the film was good", "bad", "what a lovely hotel , we all said so in the end", "电影很好。"]
PRE_NORM = ["modernbert", "gpt2", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5"]
RMS_NORM = ["llama", "mistral", "qwen2", "qwen3", "gemma", "t5", "mt5"]
families = pytest.mark.parametrize("family", FAMILIES)
two_stacks = pytest.mark.parametrize("family", [name for name in FAMILIES if len(FAMILIES[name].stacks) > 1])


def inputs_of(model):
    inputs = dict(model.tokenizer(TEXTS, padding=True, return_tensors="pt"))
    if model.task == "translation":
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(0)
    return inputs


def logits(model):
    with torch.no_grad():
        return model.network.eval()(**inputs_of(model)).logits


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(expected.abs().max())))


def features_of(units, size):
    return [unit * size + offset for unit in units for offset in range(size)]


def cut_heads(model, masked, block, kept, part="attention"):
    """Cut a block's heads of one model; zero their columns of the output projection in another: what a mask does."""
    attention = getattr(model.anatomy.blocks[block], part)
    other = getattr(masked.anatomy.blocks[block], part)
    gone = features_of(set(range(attention.units)) - set(kept), attention.unit_features)
    other.output.weight[:, gone] = 0
    keep_heads(attention, kept)


@families
def test_removing_heads_equals_masking_them(tiny_model, family):
    """Other units in each block; the same ones where the blocks share their position biases."""
    masked, cut, whole = (tiny_model(family, **SIZES) for _ in range(3))
    units = whole.anatomy.blocks[0].attention.units
    kept = {6: ([1, 4], [0, 2, 3], [5]), 3: ([0, 2], [1], [2])}[units]
    blocks = range(len(whole.anatomy.blocks))
    choice = {block: kept[0] if whole.anatomy.family.same_heads else kept[block % 3] for block in blocks}
    for block in blocks:
        cut_heads(cut, masked, block, choice[block])
        if cut.anatomy.blocks[block].cross_attention:
            cut_heads(cut, masked, block, choice[block], "cross_attention")
    same(logits(cut), logits(masked))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3  # so that the equality says something
    per_unit = 6 // units
    heads = [len(choice[block]) * per_unit for block in blocks]
    assert [shape.heads for shape in cut.anatomy.shapes] == heads
    crossing = [count if block.cross_attention else 0 for block, count in zip(cut.anatomy.blocks, heads, strict=True)]
    assert [shape.cross_heads for shape in cut.anatomy.shapes] == crossing
    assert cut.parameters < whole.parameters


@families
def test_heads_can_go_twice_and_down_to_one(tiny_model, family):
    """A key-value head goes with its queries; where one is left, its queries go singly."""
    masked, cut, whole = (tiny_model(family, **SIZES) for _ in range(3))
    attention = whole.anatomy.blocks[0].attention
    first = [1, 2]
    for block in range(len(whole.anatomy.blocks)):
        parts = ["attention"] + ["cross_attention"] * (cut.anatomy.blocks[block].cross_attention is not None)
        for part in parts:
            cut_heads(cut, masked, block, first, part)
            keep_heads(getattr(cut.anatomy.blocks[block], part), [1])
            if attention.units == 3:
                keep_heads(getattr(cut.anatomy.blocks[block], part), [1])
            last = getattr(masked.anatomy.blocks[block], part)
            head = {6: 2, 3: 5}[attention.units]
            gone = features_of(set(range(6)) - {head}, last.head_size)
            last.output.weight[:, gone] = 0
    same(logits(cut), logits(masked))
    assert {shape.heads for shape in cut.anatomy.shapes} == {1}


@families
def test_removing_neurons_equals_masking_them(tiny_model, family):
    masked, cut, whole = (tiny_model(family, **SIZES) for _ in range(3))
    kept = torch.tensor([index for index in range(53) if index % 3])
    for block in range(0, len(whole.anatomy.blocks), 2):
        masked.anatomy.blocks[block].feed_forward.down.weight[:, ::3] = 0
        keep_feed_forward(cut.anatomy.blocks[block], kept)
    same(logits(cut), logits(masked))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3
    widths = [35 if block % 2 == 0 else 53 for block in range(len(whole.anatomy.blocks))]
    assert [shape.feed_forward for shape in cut.anatomy.shapes] == widths


@families
def test_nothing_left_is_refused(tiny_model, family):
    block = tiny_model(family).anatomy.blocks[0]
    with pytest.raises(ModelError, match="can't lose all of its heads"):
        keep_heads(block.attention, [])
    with pytest.raises(ModelError, match="can't lose all of its neurons"):
        keep_feed_forward(block, torch.tensor([], dtype=torch.int64))


@pytest.mark.parametrize("family", PRE_NORM)
def test_a_silent_block_can_go(tiny_model, family):
    """Without outputs of its own a block before whose parts the norms stand passes on what it was given, exactly."""
    model = tiny_model(family, **SIZES)
    blocks = model.anatomy.blocks
    silent = blocks[1::3]  # the middle of each stack
    for block in silent:
        for part in block.parts:
            part.matrices[-1].weight.zero_()
            if part.matrices[-1].bias is not None:
                part.matrices[-1].bias.zero_()
    before = logits(model)
    keep_blocks(model.network, [index for index, block in enumerate(blocks) if block not in silent])
    assert torch.equal(logits(model), before)
    assert len(model.anatomy.blocks) == len(blocks) - len(silent)


def pass_through(_, given, made):
    """A block that hands on what it was given, and T5's position biases with it."""
    states = given[0]
    return (states, *made[1:]) if isinstance(made, tuple) else states


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].shared])
@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropping_a_block_equals_skipping_it(tiny_model, family, dropped):
    skipped, cut, whole = (tiny_model(family, **SIZES) for _ in range(3))
    if family == "modernbert" and dropped == 0:
        with pytest.raises(ModelError, match="must stay the first"):
            keep_blocks(cut.network, [1, 2])
        return
    if family == "deberta-v2" and dropped == 0:
        pytest.skip("its convolution belongs to the place after the first block, whichever stands there")
    last = len(whole.anatomy.blocks) - 3  # of an encoder-decoder, in the decoder
    skipped.anatomy.blocks[last + dropped].module.register_forward_hook(pass_through)
    keep_blocks(cut.network, [index for index in range(last + 3) if index != last + dropped])
    same(logits(cut), logits(skipped))
    assert (logits(cut) - logits(whole)).abs().max() > 1e-3
    stack = cut.anatomy.family.stacks[-1]
    assert getattr(cut.network.config, stack.layers) == len(cut.anatomy.stack(stack.name)) == 2


@families
def test_units_and_blocks_that_go_leave_the_rest_its_names(tiny_model, family):
    """Optimizers and pruning masks hold references: surgery must not make them stale."""
    model = tiny_model(family, **SIZES)
    names = {id(parameter): name for name, parameter in model.network.named_parameters()}
    for block in model.anatomy.blocks:
        for attention in block.attentions:
            keep_heads(attention, [0])
        keep_feed_forward(block, torch.tensor([0, 9]))
    keep_hidden(model.network, torch.arange(1, 36, 2))
    assert {id(parameter): name for name, parameter in model.network.named_parameters()} == names


@families
def test_units_are_kept_in_the_order_given(tiny_model, family):
    model, other = tiny_model(family, **SIZES), tiny_model(family, **SIZES)
    for block in model.anatomy.blocks:
        keep_feed_forward(block, torch.arange(52, -1, -1))
        for attention in block.attentions:
            keep_heads(attention, list(range(attention.units))[::-1])
    up, old = (each.anatomy.blocks[0].feed_forward.ups[0].weight for each in (model, other))
    assert torch.equal(up[:53], old[:53].flip(0))
    same(logits(model), logits(other))  # order means nothing


# --- blocks --------------------------------------------------------------------------------------------------------


def state_of(network):
    """Everything that dropping a block may touch."""
    attributes = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, (int, str))}
        for name, module in network.named_modules()
    }
    tensors = {name: (id(part), part.detach().clone()) for name, part in network.named_parameters()}
    return copy.deepcopy(network.config.to_dict()), attributes, tensors


@pytest.mark.parametrize("family", [name for name in FAMILIES if not FAMILIES[name].shared])
def test_blocks_taken_out_for_a_while_come_back(tiny_model, family):
    model = tiny_model(family)
    before = logits(model)
    config, attributes, tensors = state_of(model.network)
    depth = len(model.anatomy.blocks)
    kept = [0] if depth == 3 and family == "modernbert" else [index for index in range(depth) if index % 3 == 1]
    with only_blocks(model.network, kept):
        assert len(model.anatomy.blocks) == len(kept)
        assert not torch.equal(logits(model), before)
    config_now, attributes_now, tensors_now = state_of(model.network)
    assert (config_now, attributes_now) == (config, attributes)
    assert tensors_now.keys() == tensors.keys()
    for name, (identity, values) in tensors.items():
        assert tensors_now[name][0] == identity
        assert torch.equal(tensors_now[name][1], values)
    assert torch.equal(logits(model), before)


def test_blocks_come_back_after_an_error_too(tiny_model):
    model = tiny_model("t5")
    before = logits(model)
    with pytest.raises(RuntimeError, match="inside"), only_blocks(model.network, [2, 4]):
        raise RuntimeError("inside")
    assert torch.equal(logits(model), before)


@two_stacks
def test_a_stack_keeps_a_block(tiny_model, family):
    model = tiny_model(family)
    for kept, stack in (([0, 1], "decoder"), ([3], "encoder")):
        with pytest.raises(ModelError, match=f"the {stack} can't lose all of its layers"):
            keep_blocks(model.network, kept)


def test_albert_has_no_block_to_drop(tiny_model):
    with pytest.raises(ModelError, match="layers share one block"):
        keep_blocks(tiny_model("albert").network, [0])


def test_a_gpt2_that_scales_by_the_layers_number_keeps_its_layers(tiny_model):
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx"):
        keep_blocks(model.network, [0, 2])


def test_layer_types_and_places_in_the_cache_follow_their_blocks(tiny_model):
    model = tiny_model("qwen2", layer_types=["sliding_attention", "full_attention", "full_attention"])
    keep_blocks(model.network, [2, 0])
    assert model.network.config.layer_types == ["full_attention", "sliding_attention"]
    assert [block.attention.module.layer_idx for block in model.anatomy.blocks] == [0, 1]


@pytest.mark.parametrize("family", ["t5", "mt5"])
def test_the_table_of_position_biases_moves_to_the_lowest_block_left(tiny_model, family):
    model = tiny_model(family)
    tables = [model.anatomy.blocks[index].attention.position_bias.weight for index in (0, 3)]
    keep_blocks(model.network, [2, 1, 5])
    first, second, third = model.anatomy.blocks
    assert first.attention.position_bias.weight is tables[0]
    assert third.attention.position_bias.weight is tables[1]
    assert second.attention.position_bias is None
    assert [block.attention.module.has_relative_attention_bias for block in (first, second, third)] == [
        True,
        False,
        True,
    ]


# --- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].kind != "encoder"])
def test_generation_with_the_cache_equals_generation_without(tiny_model, family):
    """The places in the cache, and the heads that it holds, are those of the blocks that are left."""
    model = tiny_model(family, blocks=4)
    keep_blocks(model.network, [index for index in range(len(model.anatomy.blocks)) if index % 4 in (0, 3)])
    for block in model.anatomy.blocks:
        for attention in block.attentions:
            keep_heads(attention, list(range(1, attention.units)))
        keep_feed_forward(block, torch.arange(0, 48, 2))
    keep_hidden(model.network, torch.arange(1, 32))
    inputs = model.tokenizer("the film was good", return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "output_logits": True}
    cached, plain = (
        model.network.generate(**inputs, **options, use_cache=cache, return_dict_in_generate=True)
        for cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    same(torch.stack(cached.logits), torch.stack(plain.logits))


# --- hidden size ---------------------------------------------------------------------------------------------------


@families
def test_the_order_of_hidden_features_means_nothing(tiny_model, family):
    """An axis that is not cut, or cut twice, would put features beside weights of others."""
    model, whole = tiny_model(family, **SIZES), tiny_model(family, **SIZES)
    keep_hidden(model.network, torch.randperm(36, generator=torch.Generator().manual_seed(5)))
    same(logits(model), logits(whole))
    before = dict(whole.network.named_parameters())
    moved = sum(not torch.equal(part, before[name]) for name, part in model.network.named_parameters())
    assert moved > 0.5 * len(before)


@families
def test_a_narrower_hidden_size_reaches_every_part(tiny_model, family):
    model, whole = tiny_model(family), tiny_model(family)
    kept = torch.tensor([index for index in range(32) if index % 4])
    keep_hidden(model.network, kept)
    assert model.anatomy.hidden_size == 24
    assert model.anatomy.shapes == whole.anatomy.shapes
    table, old = (each.network.get_input_embeddings().weight for each in (model, whole))
    assert torch.equal(table, old if family in ("electra", "albert") else old[:, kept])
    assert logits(model).shape == logits(whole).shape
    assert logits(model).isfinite().all()
    assert logits(model).std() > 1e-3


@pytest.mark.parametrize("family", RMS_NORM)
def test_features_that_are_always_zero_can_go(tiny_model, family):
    """They only enter the mean of squares: 24 of 32 make it 4/3 as large, which the norms' weights can take back."""
    model, whole = tiny_model(family), tiny_model(family)
    kept = torch.tensor([index for index in range(32) if index % 4])
    for each in (model, whole):
        each.network.get_input_embeddings().weight.data[:, ::4] = 0
        for part in (part for block in each.anatomy.blocks for part in block.parts):
            part.matrices[-1].weight[::4] = 0
    keep_hidden(model.network, kept)
    added = 1.0 if family == "gemma" else 0.0  # its norms multiply by 1 + weight
    for module in model.network.modules():
        if type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and module.weight.shape == (24,):
            module.weight.data = (module.weight.data + added) * (32 / 24) ** 0.5 - added
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-3, atol=1e-3)  # the norms' epsilon stays


@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        ("electra", {"embedding_size": 24}, "embedding_size"),
        ("opt", {"word_embed_proj_dim": 24}, "word_embed_proj_dim"),
    ],
)
def test_a_hidden_size_that_has_become_another_size_is_refused(tiny_model, family, options, name):
    model, whole = tiny_model(family, **options), tiny_model(family, **options)
    keep_hidden(model.network, torch.arange(32).flip(0))
    same(logits(model), logits(whole))
    keep_hidden(model.network, torch.arange(24))
    with pytest.raises(ModelError, match=f"{name} and the hidden size are both 24"):
        keep_hidden(model.network, torch.arange(20))


def test_as_many_labels_as_features_are_refused(tiny_model):
    model = tiny_model("bert", labels=[f"label {index}" for index in range(32)])
    with pytest.raises(ModelError, match="num_labels and the hidden size are both 32"):
        keep_hidden(model.network, torch.arange(20))
