"""The only place that knows architectures: where a family keeps its blocks, projections and head.

A new family is one row of FAMILIES. Names are dotted paths: a stack's `blocks` from the base model (the network without
its head), the rest from one block. Two things differ so much between families that they are named here once:

- one module may hold several projections: GPT-2's `c_attn` holds queries, keys and values one after the other,
  GPT-NeoX's `query_key_value` head by head, ModernBERT's `Wi` the two halves of a gated feed-forward;
- GPT-2's Conv1D stores (in, out). `Matrix.weight` is (out, in) for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from moss_rlhf.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

# --- the rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Projections:
    """Where one attention keeps its parts, relative to the block."""

    module: str
    producers: tuple[str, ...]  # of queries, keys and values, relative to the attention module; or one, fused
    output: str  # relative to the block
    fused: Literal["one after the other", "head by head"] | None = None
    counts: tuple[str, ...] = ()  # attributes of the module that hold its number of heads …
    widths: tuple[str, ...] = ()  # … and heads · head size
    optional: tuple[str, ...] = ()  # further producers of one row a query feature, where the module has them
    position_bias: str | None = None  # an embedding with one column a head, where the module has it
    norm: str | None = None  # relative to the block: in pre-norm blocks, what only the producers read


@dataclass(frozen=True)
class Widths:
    """Where the feed-forward is, relative to the block."""

    ups: tuple[str, ...]  # up and, in a gated one, gate: each one row a neuron
    down: str
    fused: bool = False  # `ups` is one module that holds gate and up one after the other
    norm: str | None = None  # in pre-norm blocks, what only `ups` read


@dataclass(frozen=True)
class Stack:
    """One stack of blocks: its parts, and the keys of config.json that give its sizes."""

    blocks: str
    attention: Projections
    feed_forward: tuple[Widths, ...]  # the first whose modules are there
    cross_attention: Projections | None = None
    name: Literal["encoder", "decoder"] = "encoder"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    feed_forward_size: str = "intermediate_size"
    key_value_heads: str | None = None
    pre_norm: str | None = None  # a key that says whether the norms named here do stand before their part


@dataclass(frozen=True)
class Family:
    """One row: a model type's stacks and what is peculiar to it.

    head_size   the config key that frees the size of a head from hidden size / heads; None: the stock config can't say
                fewer heads.
    above       parts of the base model that stand above the blocks.
    shared      one block is applied again and again.
    same_heads  every block of a stack must keep the same heads: they share one table of position biases.
    first_stays the first block differs from the rest and can't be dropped.
    unit_offset norms multiply by 1 + weight.
    transposed  matrices are kept (in, out), in Conv1D layers.
    """

    stacks: tuple[Stack, ...]
    hidden: str = "hidden_size"
    head_size: str | None = None
    heads_divide_hidden: bool = False  # … which the config's own check demands
    above: tuple[str, ...] = ("pooler",)
    shared: bool = False
    same_heads: bool = False
    first_stays: bool = False
    floating: tuple[str, ...] = ()  # tables of the base model that are read whole, not looked up by ids
    unit_offset: bool = False
    transposed: bool = False
    scales_embeddings: bool = False  # by the root of the hidden size that config.json gives

    @property
    def kind(self) -> Literal["encoder", "decoder", "encoder-decoder"]:
        return "encoder-decoder" if len(self.stacks) > 1 else self.stacks[0].name


def _encoder(stack: Stack, **peculiar: Any) -> Family:
    return Family((stack,), **peculiar)


_BERT = Stack(
    "encoder.layer",
    Projections(
        "attention.self",
        ("query", "key", "value"),
        "attention.output.dense",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
    ),
    (Widths(("intermediate.dense",), "output.dense"),),
)
_DEBERTA = Stack(
    "encoder.layer",
    Projections(
        "attention.self",
        ("query_proj", "key_proj", "value_proj"),
        "attention.output.dense",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
        optional=("pos_key_proj", "pos_query_proj"),
    ),
    (Widths(("intermediate.dense",), "output.dense"),),
)
_DISTILBERT = Stack(
    "transformer.layer",
    Projections("attention", ("q_lin", "k_lin", "v_lin"), "attention.out_lin", counts=("n_heads",)),
    (Widths(("ffn.lin1",), "ffn.lin2"),),
    layers="n_layers",
    heads="n_heads",
    feed_forward_size="hidden_dim",
)
_MODERNBERT = Stack(
    "layers",
    Projections("attn", ("Wqkv",), "attn.Wo", fused="one after the other", norm="attn_norm"),
    (Widths(("mlp.Wi",), "mlp.Wo", fused=True, norm="mlp_norm"),),
)
_ALBERT = Stack(
    "encoder.albert_layer_groups",
    Projections(
        "attention",
        ("query", "key", "value"),
        "attention.dense",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
    ),
    (Widths(("ffn",), "ffn_output"),),
)
_GPT2 = Stack(
    "h",
    Projections(
        "attn",
        ("c_attn",),
        "attn.c_proj",
        fused="one after the other",
        counts=("num_heads",),
        widths=("split_size", "embed_dim"),
        norm="ln_1",
    ),
    (Widths(("mlp.c_fc",), "mlp.c_proj", norm="ln_2"),),
    name="decoder",
    layers="n_layer",
    heads="n_head",
    feed_forward_size="n_inner",
)
_GPT_NEOX = Stack(
    "layers",
    Projections("attention", ("query_key_value",), "attention.dense", fused="head by head", norm="input_layernorm"),
    (Widths(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", norm="post_attention_layernorm"),),
    name="decoder",
)
_BART_ATTENTION = Projections(
    "self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.out_proj", counts=("num_heads",), widths=("embed_dim",)
)
_OPT = Stack(
    "decoder.layers",
    replace(_BART_ATTENTION, norm="self_attn_layer_norm"),
    (Widths(("fc1",), "fc2", norm="final_layer_norm"),),
    name="decoder",
    feed_forward_size="ffn_dim",
    pre_norm="do_layer_norm_before",
)
_LLAMA = Stack(
    "layers",
    Projections("self_attn", ("q_proj", "k_proj", "v_proj"), "self_attn.o_proj", norm="input_layernorm"),
    (Widths(("mlp.up_proj", "mlp.gate_proj"), "mlp.down_proj", norm="post_attention_layernorm"),),
    name="decoder",
    key_value_heads="num_key_value_heads",
)


def _bart(name: Literal["encoder", "decoder"]) -> Stack:
    crossing = Projections(
        "encoder_attn",
        ("q_proj", "k_proj", "v_proj"),
        "encoder_attn.out_proj",
        counts=("num_heads",),
        widths=("embed_dim",),
    )
    return Stack(
        f"{name}.layers",
        _BART_ATTENTION,
        (Widths(("fc1",), "fc2"),),
        crossing if name == "decoder" else None,
        name,
        layers=f"{name}_layers",
        heads=f"{name}_attention_heads",
        feed_forward_size=f"{name}_ffn_dim",
    )


def _t5_attention(module: str) -> Projections:
    return Projections(
        module,
        ("q", "k", "v"),
        f"{module}.o",
        counts=("n_heads",),
        widths=("inner_dim",),
        position_bias="relative_attention_bias",
        norm=f"{module.rpartition('.')[0]}.layer_norm",
    )


def _t5(name: Literal["encoder", "decoder"]) -> Stack:
    last = 2 if name == "decoder" else 1
    ups, norm = f"layer.{last}.DenseReluDense", f"layer.{last}.layer_norm"
    return Stack(
        f"{name}.block",
        _t5_attention("layer.0.SelfAttention"),
        (
            Widths((f"{ups}.wi_1", f"{ups}.wi_0"), f"{ups}.wo", norm=norm),  # the linear one first
            Widths((f"{ups}.wi",), f"{ups}.wo", norm=norm),
        ),
        _t5_attention("layer.1.EncDecAttention") if name == "decoder" else None,
        name,
        layers="num_decoder_layers" if name == "decoder" else "num_layers",
        heads="num_heads",
        feed_forward_size="d_ff",
    )


def _t5_family(scales_embeddings: bool) -> Family:
    return Family(
        (_t5("encoder"), _t5("decoder")),
        hidden="d_model",
        head_size="d_kv",
        above=("decoder.final_layer_norm",),
        same_heads=True,
        scales_embeddings=scales_embeddings,
    )


_BART_FAMILY = Family((_bart("encoder"), _bart("decoder")), hidden="d_model", above=(), scales_embeddings=True)

FAMILIES: Mapping[str, Family] = {
    "bert": _encoder(_BERT),
    "roberta": _encoder(_BERT),
    "xlm-roberta": _encoder(_BERT),
    "electra": _encoder(_BERT),
    "distilbert": _encoder(_DISTILBERT, hidden="dim"),
    "deberta-v2": _encoder(_DEBERTA, floating=("encoder.rel_embeddings",)),
    "modernbert": _encoder(_MODERNBERT, above=("final_norm",), first_stays=True),
    "albert": _encoder(_ALBERT, shared=True),
    "gpt2": _encoder(_GPT2, hidden="n_embd", above=("ln_f",), transposed=True),
    "gpt_neox": _encoder(_GPT_NEOX, above=("final_layer_norm",)),
    "opt": _encoder(_OPT, above=("decoder.final_layer_norm", "decoder.project_out")),
    "llama": _encoder(_LLAMA, head_size="head_dim", heads_divide_hidden=True, above=("norm",)),
    "mistral": _encoder(_LLAMA, head_size="head_dim", above=("norm",)),
    "qwen2": _encoder(_LLAMA, head_size="head_dim", above=("norm",)),
    "qwen3": _encoder(_LLAMA, head_size="head_dim", above=("norm",)),
    "gemma": _encoder(_LLAMA, head_size="head_dim", above=("norm",), unit_offset=True, scales_embeddings=True),
    "t5": _t5_family(scales_embeddings=True),  # of the head, where it is tied to them
    "mt5": _t5_family(scales_embeddings=False),
    "bart": _BART_FAMILY,
    "marian": _BART_FAMILY,
}


def family_of(model_type: str) -> Family:
    """The row of a config's `model_type`; ModelError names the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model type {model_type!r} is not known here yet. Known families: {known}.")
    return FAMILIES[model_type]


def refuse_groups(groups: int, blocks: int) -> None:
    """ALBERT's layers may share several blocks by turns; every published checkpoint has one."""
    if (groups, blocks) != (1, 1):
        raise ModelError(
            f"model: an ALBERT of {groups} groups of {blocks} blocks is not known here; its layers must share "
            "one block. Give a checkpoint with num_hidden_groups 1 and inner_group_num 1."
        )


# --- one network ---------------------------------------------------------------------------------------------------


def matrix_names(family: Family) -> set[str]:
    """Last parts of the names that the matrices of a family's blocks have."""
    found: set[str] = set()
    for stack in family.stacks:
        for part in filter(None, (stack.attention, stack.cross_attention)):
            found |= {*part.producers, *part.optional, part.output}
        for widths in stack.feed_forward:
            found |= {*widths.ups, widths.down}
    return {name.rpartition(".")[2] for name in found}


@dataclass(frozen=True)
class BlockShape:
    """What can differ from block to block. `cross_heads` is 0 where there is no cross-attention."""

    heads: int
    feed_forward: int
    cross_heads: int = 0


@dataclass(frozen=True)
class Matrix:
    """One linear map of a block, (out, in), whatever module holds it."""

    name: str  # of its weight in the network: "bert.encoder.layer.0.intermediate.dense.weight"
    module: nn.Module = field(repr=False)

    @property
    def transposed(self) -> bool:
        """GPT-2's Conv1D stores (in, out), under an adapter too."""
        inner = dict(self.module.named_children()).get("base_layer", self.module)
        return type(inner).__name__ == "Conv1D"

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight  # type: ignore[return-value]  # not of a bare Module, but of every one that is here

    @property
    def weight(self) -> Tensor:
        """(out, in): a view, so what is written to it in place changes the parameter."""
        weight = self.parameter.data
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.module.bias is None else self.module.bias.data  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def set_weight(self, weight: Tensor) -> None:
        """Put another (out, in) weight in its place, of any size; the parameter keeps its identity."""
        self.parameter.data = weight.T.contiguous() if self.transposed else weight.contiguous()
        out_features, in_features = weight.shape
        declared = {"out_features": out_features, "in_features": in_features, "nf": out_features, "nx": in_features}
        for name, size in declared.items():
            if name in vars(self.module):
                setattr(self.module, name, size)


@dataclass(frozen=True)
class Folding:
    """What makes the inputs of some matrices, and nothing else reads: scales can move from the one into the others.

    name        of what is made: "attention.input", "attention.value", "feed_forward.input", "feed_forward.product".
    module      a norm, or the linear map before; a softmax's average or the product with a gate may lie between.
    rows        for each input feature of the followers, which entry of the norm or row of the map makes it: query heads
                that share a value head read the same rows.
    followers   all that reads it.
    """

    name: str
    module: nn.Module = field(repr=False)
    rows: tuple[int, ...] = field(repr=False)
    followers: tuple[Matrix, ...]
    unit_offset: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention of a block: what produces its queries, keys and values, and its output projection.

    A *unit* is what can be removed: a key-value head with the queries that read it, or one query head where a single
    key-value head serves all.
    """

    module: nn.Module = field(repr=False)
    row: Projections
    producers: tuple[Matrix, ...]
    output: Matrix
    head_size: int
    norm: nn.Module | None = field(default=None, repr=False)  # what makes its input, and nothing else reads

    @property
    def heads(self) -> int:
        return self.output.in_features // self.head_size

    @property
    def key_value_heads(self) -> int:
        return self.heads if self.row.fused else self.producers[1].out_features // self.head_size

    @property
    def units(self) -> int:
        return self.heads if self.key_value_heads == 1 else self.key_value_heads

    @property
    def heads_per_unit(self) -> int:
        return self.heads // self.units

    @property
    def unit_features(self) -> int:
        """Input features of the output projection that one unit owns."""
        return self.heads_per_unit * self.head_size

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return *self.producers, self.output

    @property
    def position_bias(self) -> nn.Module | None:
        children = dict(self.module.named_children())
        return children.get(self.row.position_bias) if self.row.position_bias else None

    @property
    def value_rows(self) -> tuple[int, ...]:
        """For each input feature of the output projection, the row of `value_producer` that makes it."""
        size, sharing = self.head_size, self.heads // self.key_value_heads
        if self.row.fused == "head by head":
            starts = [(3 * head + 2) * size for head in range(self.heads)]
        else:
            first = 2 * self.heads * size if self.row.fused else 0
            starts = [first + head // sharing * size for head in range(self.heads)]
        return tuple(start + feature for start in starts for feature in range(size))

    @property
    def value_producer(self) -> Matrix:
        return self.producers[0 if self.row.fused else 2]

    def foldings(self, name: str, *, crossing: bool, unit_offset: bool) -> Iterator[Folding]:
        """Its input, where a norm makes it for itself alone, and its values, which softmax only averages."""
        if self.norm is not None:  # the keys and values of a cross-attention come from the encoder
            readers = self.producers[: 1 if crossing else len(self.row.producers)]
            yield Folding(f"{name}.input", self.norm, tuple(range(readers[0].in_features)), readers, unit_offset)
        yield Folding(f"{name}.value", self.value_producer.module, self.value_rows, (self.output,))


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of a block: up (and gate), then down."""

    row: Widths
    ups: tuple[Matrix, ...]
    down: Matrix
    norm: nn.Module | None = field(default=None, repr=False)

    @property
    def width(self) -> int:
        return self.down.in_features

    def foldings(self, *, unit_offset: bool) -> Iterator[Folding]:
        """Its input, and in a gated one the product: what comes out of `up` meets no nonlinearity."""
        if self.norm is not None:
            features = tuple(range(self.ups[0].in_features))
            yield Folding("feed_forward.input", self.norm, features, self.ups, unit_offset)
        if self.row.fused or len(self.ups) > 1:
            first = self.width if self.row.fused else 0
            neurons = tuple(range(first, first + self.width))
            yield Folding("feed_forward.product", self.ups[0].module, neurons, (self.down,))

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return *self.ups, self.down


@dataclass(frozen=True)
class Origin:
    """Where a block stood in its stack before any was dropped: block `index` of `depth`."""

    index: int
    depth: int


_ORIGIN = "moss_origin"  # an attribute of a block's module: it goes wherever the block goes


@dataclass(frozen=True)
class Block:
    """One transformer block and its parts, live modules of the network."""

    index: int  # in its stack
    stack: Literal["encoder", "decoder"]
    name: str  # "block.3"; "encoder.3", "decoder.3" where there are two stacks
    module: nn.Module = field(repr=False)
    attention: Attention
    cross_attention: Attention | None
    feed_forward: FeedForward
    unit_offset: bool = False  # its norms multiply by 1 + weight

    @property
    def origin(self) -> Origin | None:
        """None where its stack was never shortened."""
        found: Origin | None = vars(self.module).get(_ORIGIN)
        return found

    def set_origin(self, origin: Origin) -> None:
        setattr(self.module, _ORIGIN, origin)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return (self.attention,) if self.cross_attention is None else (self.attention, self.cross_attention)

    @property
    def parts(self) -> tuple[Attention | FeedForward, ...]:
        return *self.attentions, self.feed_forward

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for part in self.parts for matrix in part.matrices)

    @property
    def shape(self) -> BlockShape:
        crossing = self.cross_attention.heads if self.cross_attention else 0
        return BlockShape(self.attention.heads, self.feed_forward.width, crossing)

    @property
    def foldings(self) -> tuple[Folding, ...]:
        """Where scales can move without changing what the block computes, from its input on."""
        offset = self.unit_offset
        found = list(self.attention.foldings("attention", crossing=False, unit_offset=offset))
        if self.cross_attention:
            found += self.cross_attention.foldings("cross_attention", crossing=True, unit_offset=offset)
        return *found, *self.feed_forward.foldings(unit_offset=offset)


@dataclass(frozen=True)
class Anatomy:
    """What our methods need to know of one network.

    blocks       the encoder's, then the decoder's.
    embeddings   named parameters below the blocks; head: those above them.
    repeats      how often the blocks are gone through: ALBERT's one block serves as many layers.
    """

    family: Family
    blocks: tuple[Block, ...]
    embeddings: tuple[tuple[str, nn.Parameter], ...]
    head: tuple[tuple[str, nn.Parameter], ...]
    hidden_size: int
    repeats: int = 1

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return tuple(block.shape for block in self.blocks)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(matrix for block in self.blocks for matrix in block.matrices)

    def stack(self, name: str) -> tuple[Block, ...]:
        return tuple(block for block in self.blocks if block.stack == name)


def anatomy_of(network: Any) -> Anatomy:
    """Find the parts of a Hugging Face network.

    raises   ModelError if its family is unknown, or a part is not where it should be.

    A narrowed network tells its shapes itself; its config may still say the stock ones.
    """
    config = network.config
    family = family_of(config.model_type)
    if family.shared:
        refuse_groups(config.num_hidden_groups, config.inner_group_num)
    names = {id(module): name for name, module in network.named_modules()}
    blocks = tuple(block for stack in family.stacks for block in _blocks(network, family, stack, names))
    in_blocks = {id(parameter) for block in blocks for parameter in block.module.parameters()}
    outside = [(name, parameter) for name, parameter in network.named_parameters() if id(parameter) not in in_blocks]
    above = _above(network, family, names)
    repeats = getattr(config, family.stacks[0].layers) if family.shared else 1
    return Anatomy(
        family=family,
        blocks=blocks,
        embeddings=tuple(part for part in outside if not part[0].startswith(above)),
        head=tuple(part for part in outside if part[0].startswith(above)),
        hidden_size=blocks[0].feed_forward.down.out_features,
        repeats=repeats,
    )


def _above(network: Any, family: Family, names: Mapping[int, str]) -> tuple[str, ...]:
    """Prefixes of the names of what stands above the blocks."""
    base = network.base_model
    inside = f"{names[id(base)]}." if base is not network else ""
    heads = [f"{name}." for name, child in network.named_children() if child is not base] if inside else ["lm_head."]
    return *heads, *(f"{inside}{part}." for part in family.above)


def _blocks(network: Any, family: Family, stack: Stack, names: Mapping[int, str]) -> Iterator[Block]:
    config, two = network.config, len(family.stacks) > 1
    head_size = _head_size(config, family, stack)
    pre_norm = stack.pre_norm is None or bool(getattr(config, stack.pre_norm))
    try:
        for index, module in enumerate(block_modules(network, stack)):
            yield Block(
                index=index,
                stack=stack.name,
                name=f"{stack.name if two else 'block'}.{index}",
                module=module,
                attention=_attention(module, stack.attention, head_size, names, pre_norm),
                cross_attention=_attention(module, stack.cross_attention, head_size, names, pre_norm)
                if stack.cross_attention
                else None,
                feed_forward=_feed_forward(module, stack.feed_forward, names, pre_norm),
                unit_offset=family.unit_offset,
            )
    except AttributeError as error:
        raise ModelError(
            f"{config.model_type}: the {stack.name} of this {type(network).__name__} has not the expected parts: "
            f"{error}. Give a checkpoint of the family's own architecture."
        ) from error


def block_modules(network: Any, stack: Stack) -> list[nn.Module]:
    """The modules of a stack's blocks, in order."""
    found = list(network.base_model.get_submodule(stack.blocks))
    if stack.blocks.endswith("albert_layer_groups"):
        return [layer for group in found for layer in group.albert_layers]
    return found


def _head_size(config: Any, family: Family, stack: Stack) -> int:
    declared = getattr(config, family.head_size, None) if family.head_size else None
    return int(declared or getattr(config, family.hidden) // getattr(config, stack.heads))


def _attention(
    block: nn.Module, row: Projections, head_size: int, names: Mapping[int, str], pre_norm: bool
) -> Attention:
    module = block.get_submodule(row.module)
    children = dict(module.named_children())
    paths = [*row.producers, *(name for name in row.optional if name in children)]
    producers = tuple(_matrix(module.get_submodule(path), names) for path in paths)
    output, norm = _matrix(block.get_submodule(row.output), names), _norm(block, row.norm if pre_norm else None)
    return Attention(module, row, producers, output, head_size, norm)


def _feed_forward(block: nn.Module, rows: Sequence[Widths], names: Mapping[int, str], pre_norm: bool) -> FeedForward:
    modules = dict(block.named_modules())
    row = next((row for row in rows if all(up in modules for up in row.ups)), rows[-1])
    ups = tuple(_matrix(block.get_submodule(up), names) for up in row.ups)
    norm = _norm(block, row.norm if pre_norm else None)
    return FeedForward(row, ups, _matrix(block.get_submodule(row.down), names), norm)


def _norm(block: nn.Module, name: str | None) -> nn.Module | None:
    """None where there is none to fold into: ModernBERT's first block has an identity there."""
    norm = block.get_submodule(name) if name else None
    return norm if norm is not None and dict(norm.named_parameters(recurse=False)).get("weight") is not None else None


def _matrix(module: nn.Module, names: Mapping[int, str]) -> Matrix:
    return Matrix(f"{names[id(module)]}.weight", module)
