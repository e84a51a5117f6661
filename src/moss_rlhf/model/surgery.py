"""Cut a network physically: fewer heads, narrower feed-forward, smaller hidden size, fewer blocks.

Parameters keep their identity (`.data` is replaced), so optimizers' and masks' references to them stay true.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import (
    Anatomy,
    Attention,
    Block,
    BlockShape,
    Matrix,
    Origin,
    Stack,
    anatomy_of,
    block_modules,
)
from moss_rlhf.model.limits import depth_fault


@torch.no_grad()
def keep_outputs(matrix: Matrix, kept: Tensor) -> None:
    """Keep the output features `kept` (indices, int64) of a matrix and its bias, in that order."""
    if matrix.bias is not None:
        matrix.module.bias.data = matrix.bias[kept].clone()
    matrix.set_weight(matrix.weight[kept].clone())


@torch.no_grad()
def keep_inputs(matrix: Matrix, kept: Tensor) -> None:
    """Keep the input features `kept` (indices, int64) of a matrix, in that order."""
    matrix.set_weight(matrix.weight[:, kept].clone())


def _spans(indices: Sequence[int], size: int) -> Tensor:
    """The features of units of `size` features: unit i owns i · size … (i + 1) · size − 1."""
    return (torch.tensor(list(indices), dtype=torch.int64)[:, None] * size + torch.arange(size)).flatten()


def keep_heads(attention: Attention, units: Sequence[int]) -> None:
    """Keep the units `units` of one attention: rows of what makes q, k and v, columns of the output projection.

    Where a family has `same_heads`, every attention of a kind in a stack must be given the same units: T5's blocks all
    read the position biases of the lowest one, whose columns follow its heads.
    raises   ModelError where none would stay.
    """
    if not len(units):
        raise ModelError("an attention can't lose all of its heads; keep at least one.")
    heads, pairs = attention.heads, attention.key_value_heads
    kept = [unit * attention.heads_per_unit + offset for unit in units for offset in range(attention.heads_per_unit)]
    kept_pairs = [0] if pairs == 1 and heads > 1 else list(units)
    rows = _producer_rows(attention, kept, kept_pairs)
    output_columns = _spans(kept, attention.head_size)
    for matrix, indices in zip(attention.producers, rows, strict=True):
        keep_outputs(matrix, indices)
    keep_inputs(attention.output, output_columns)
    if isinstance(attention.position_bias, nn.Embedding):
        _keep_columns(attention.position_bias, torch.tensor(kept))
    _declare_heads(attention, len(kept), len(kept_pairs))


def _producer_rows(attention: Attention, heads: Sequence[int], pairs: Sequence[int]) -> list[Tensor]:
    """For each producer, the rows that make the kept query heads and key-value heads."""
    size, row = attention.head_size, attention.row
    if row.fused == "head by head":
        return [_spans(heads, 3 * size)]
    if row.fused:
        return [_spans([part * attention.heads + head for part in range(3) for head in heads], size)]
    of_queries, of_pairs = _spans(heads, size), _spans(pairs, size)
    return [of_queries, of_pairs, of_pairs, *[of_queries] * (len(attention.producers) - 3)]


@torch.no_grad()
def _keep_columns(table: nn.Embedding, kept: Tensor) -> None:
    table.weight.data = table.weight.data[:, kept].contiguous()
    table.embedding_dim = len(kept)


def _declare_heads(attention: Attention, heads: int, pairs: int) -> None:
    # some modules of transformers 5 read the number of heads off the projections, others from these attributes
    module: Any = attention.module
    for name in attention.row.counts:
        setattr(module, name, heads)
    for name in attention.row.widths:
        setattr(module, name, heads * attention.head_size)
    if "num_key_value_groups" in vars(module):
        module.num_key_value_groups = heads // pairs


def keep_feed_forward(block: Block, kept: Tensor) -> None:
    """Keep the feed-forward neurons `kept` (indices, int64) of one block; ModelError where none would stay."""
    if not len(kept):
        raise ModelError("a feed-forward can't lose all of its neurons; keep at least one.")
    part = block.feed_forward
    rows = torch.cat([kept, kept + part.width]) if part.row.fused else kept
    for matrix in part.ups:
        keep_outputs(matrix, rows)
    keep_inputs(part.down, kept)


@torch.no_grad()
def keep_hidden(network: Any, kept: Tensor) -> None:
    """Keep the features `kept` (indices, int64) of the hidden size, everywhere.

    In the blocks: inputs of what makes queries, keys, values and neurons, outputs of what writes back. Outside: every
    axis of that size, tables of positions and words by their columns only. A dense layer between the blocks and the
    classifier keeps the same features on both sides.
    """
    anatomy = anatomy_of(network)
    _refuse_equal_sizes(network.config, anatomy)
    for block in anatomy.blocks:
        for part in block.parts:
            for matrix in part.matrices[:-1]:
                keep_inputs(matrix, kept)
            keep_outputs(part.matrices[-1], kept)
    cut = {id(parameter) for matrix in anatomy.matrices for parameter in matrix.module.parameters()}
    matrices, head = {id(matrix.module) for matrix in anatomy.matrices}, network.get_output_embeddings()
    for module in network.modules():
        if id(module) not in matrices:
            table = isinstance(module, nn.Embedding) or module is head
            _keep_features(module, anatomy.hidden_size, kept, table, cut)


def _refuse_equal_sizes(config: Any, anatomy: Anatomy) -> None:
    """Outside the blocks an axis is known by its size alone."""
    size, stock = anatomy.hidden_size, getattr(config, anatomy.family.hidden)
    others = {name: getattr(config, name, None) for name in ("embedding_size", "word_embed_proj_dim")}
    equal = [name for name, value in others.items() if value == size != stock]
    equal += ["num_labels"] if config.num_labels == size else []
    if equal:
        raise ModelError(
            f"{equal[0]} and the hidden size are both {size}: what carries which can't be told apart. Narrow the "
            "hidden size in one step, or leave it."
        )


def _keep_features(module: nn.Module, size: int, kept: Tensor, table: bool, cut: set[int]) -> None:
    """Cut the axes of one module that carry the hidden size: of a table (rows are tokens or positions) its columns.

    cut   ids of the parameters that are done: tied ones stand in several modules. Grows.
    """
    for parameter in dict(module.named_parameters(recurse=False)).values():
        axes = [axis for axis in range(parameter.dim()) if parameter.shape[axis] == size]
        for axis in [] if id(parameter) in cut else [1] if table and 1 in axes else [] if table else axes:
            parameter.data = parameter.data.index_select(axis, kept.to(parameter.device)).contiguous()
        cut.add(id(parameter))
    _declare_features(module, size, len(kept), table)


def _declare_features(module: Any, size: int, kept: int, table: bool) -> None:
    inputs = ("in_features", "embedding_dim")
    for name in inputs if table else (*inputs, "out_features", "in_channels", "out_channels"):
        if vars(module).get(name) == size:
            setattr(module, name, kept)
    if vars(module).get("normalized_shape") == (size,):
        module.normalized_shape = (kept,)


def keep_blocks(network: Any, kept: Sequence[int]) -> None:
    """Keep the blocks `kept` (positions in `anatomy.blocks`), in that order; the config follows.

    What only one block carries goes along: T5's position biases move to the lowest block that stays, a pattern of
    layer types keeps its entries. Each block remembers where it stood before any was dropped (`Block.origin`).
    raises   ModelError where blocks are shared, a stack would lose all of its blocks, or its first one must stay.
    """
    anatomy = anatomy_of(network)
    _refuse_blocks(network.config, anatomy, kept)
    for stack in anatomy.family.stacks:
        blocks = anatomy.stack(stack.name)
        positions = [index for index in kept if anatomy.blocks[index].stack == stack.name]
        staying = [anatomy.blocks[index] for index in positions]
        if len(staying) < len(blocks):
            _remember_origins(blocks)
        _move_position_bias(blocks[0].attention, staying[0].attention)
        _put_blocks(network, stack, nn.ModuleList(block.module for block in staying))
        setattr(network.config, stack.layers, len(staying))
        _follow(network.config, [block.index for block in staying], len(blocks))
    _number_blocks(network)


def _remember_origins(blocks: Sequence[Block]) -> None:
    """Those of blocks that lost neighbours before stay as they are."""
    for block in blocks:
        if block.origin is None:
            block.set_origin(Origin(block.index, len(blocks)))


def _refuse_blocks(config: Any, anatomy: Anatomy, kept: Sequence[int]) -> None:
    scaled = bool(getattr(config, "scale_attn_by_inverse_layer_idx", False))
    if fault := depth_fault(shared=anatomy.family.shared, scaled_by_layer=scaled):
        raise ModelError(fault)
    for stack in anatomy.family.stacks:
        indices = [anatomy.blocks[index].index for index in kept if anatomy.blocks[index].stack == stack.name]
        if not indices:
            raise ModelError(f"the {stack.name} can't lose all of its layers; keep at least one.")
        if anatomy.family.first_stays and indices[0] != 0:
            raise ModelError("its first block reads the embeddings without a norm of its own and must stay the first.")


def _move_position_bias(source: Attention, target: Attention) -> None:
    """T5's stack has one table of position biases, in the attention of its lowest block."""
    if source.position_bias is None or source.module is target.module:
        return
    giver, taker, name = source.module, target.module, str(source.row.position_bias)
    taker.add_module(name, source.position_bias)
    delattr(giver, name)
    for module, has in ((giver, False), (taker, True)):
        module.has_relative_attention_bias = has  # type: ignore[assignment]


def _put_blocks(network: Any, stack: Stack, blocks: nn.Module) -> None:
    path, _, name = stack.blocks.rpartition(".")
    parent = network.base_model.get_submodule(path)
    blocks.training = parent.training
    setattr(parent, name, blocks)


def _follow(config: Any, kept: Sequence[int], layers: int) -> None:
    types = getattr(config, "layer_types", None)
    if types is not None and len(types) == layers:
        config.layer_types = [types[index] for index in kept]


def _number_blocks(network: Any) -> None:
    """Layers number their places in the cache of keys and values."""
    for stack in anatomy_of(network).family.stacks:
        for index, block in enumerate(block_modules(network, stack)):
            for module in block.modules():
                if vars(module).get("layer_idx") is not None:
                    module.layer_idx = index  # type: ignore[assignment]


@contextmanager
def only_blocks(network: Any, kept: Sequence[int]) -> Iterator[None]:
    """The network with the blocks `kept` alone, for a while; raises as `keep_blocks` does."""
    anatomy, config = anatomy_of(network), network.config
    types = getattr(config, "layer_types", None)
    lists = [network.base_model.get_submodule(stack.blocks) for stack in anatomy.family.stacks]
    keep_blocks(network, kept)
    lowest = {stack.name: anatomy_of(network).stack(stack.name)[0] for stack in anatomy.family.stacks}
    try:
        yield
    finally:
        for stack, modules in zip(anatomy.family.stacks, lists, strict=True):
            blocks = anatomy.stack(stack.name)
            _move_position_bias(lowest[stack.name].attention, blocks[0].attention)
            _put_blocks(network, stack, modules)
            setattr(config, stack.layers, len(blocks))
        if types is not None:
            config.layer_types = types
        _number_blocks(network)


def reshape(network: Any, shapes: Sequence[BlockShape], hidden: int | None = None) -> None:
    """Give a freshly built network the declared shapes; its weights are placeholders, to be loaded over."""
    for block, shape in zip(anatomy_of(network).blocks, shapes, strict=True):
        _reshape_attention(block.attention, shape.heads)
        if block.cross_attention is not None:
            _reshape_attention(block.cross_attention, shape.cross_heads)
        if shape.feed_forward != block.shape.feed_forward:
            keep_feed_forward(block, torch.arange(shape.feed_forward))
    if hidden is not None and hidden != anatomy_of(network).hidden_size:
        keep_hidden(network, torch.arange(hidden))


def _reshape_attention(attention: Attention, heads: int) -> None:
    if heads < attention.heads_per_unit:  # one key-value head is left, and of its queries not all
        keep_heads(attention, [0])
    if heads != attention.heads:
        keep_heads(attention, range(heads // attention.heads_per_unit))
