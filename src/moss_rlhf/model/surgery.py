"""Cut a network physically: fewer heads, narrower feed-forward, fewer blocks.

Parameters keep their identity (`.data` is replaced), so optimizers' and masks' references to them stay true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Anatomy, Block, BlockShape, anatomy_of


@torch.no_grad()
def keep_outputs(linear: nn.Linear, kept: Tensor) -> None:
    """Keep the output features `kept` (indices, int64) of a linear layer, in that order."""
    linear.weight.data = linear.weight.data[kept].clone()
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[kept].clone()
    linear.out_features = len(kept)


@torch.no_grad()
def keep_inputs(linear: nn.Linear, kept: Tensor) -> None:
    """Keep the input features `kept` (indices, int64) of a linear layer, in that order."""
    linear.weight.data = linear.weight.data[:, kept].clone()
    linear.in_features = len(kept)


def keep_heads(block: Block, kept: Sequence[int]) -> None:
    """Keep the attention heads `kept` of one block: rows of q, k, v and columns of the output projection."""
    size = block.head_size
    features = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
    for linear in (block.query, block.key, block.value):
        keep_outputs(linear, features)
    keep_inputs(block.attention_output, features)
    _declare_heads(block, len(kept))


def _declare_heads(block: Block, heads: int) -> None:
    # transformers 5 reads the number of heads off the projections; these attributes are for whoever prints the module
    setattr(block.attention, block.head_count, heads)
    if hasattr(block.attention, "all_head_size"):
        setattr(block.attention, "all_head_size", heads * block.head_size)  # noqa: B010  # mypy takes it for a Module


def keep_feed_forward(block: Block, kept: Tensor) -> None:
    """Keep the feed-forward neurons `kept` (indices, int64) of one block."""
    keep_outputs(block.up, kept)
    keep_inputs(block.down, kept)


def keep_blocks(network: Any, kept: Sequence[int]) -> None:
    """Keep the blocks `kept`, in that order; the config follows."""
    anatomy = anatomy_of(network)
    set_blocks(network, anatomy, [anatomy.blocks[index].module for index in kept])
    setattr(network.config, anatomy.family.layers, len(kept))


def set_blocks(network: Any, anatomy: Anatomy, modules: Sequence[nn.Module]) -> None:
    """Put `modules` in the place of the network's blocks, without touching its config."""
    path, _, name = anatomy.family.blocks.rpartition(".")
    setattr(network.base_model.get_submodule(path), name, nn.ModuleList(modules))


def reshape(network: Any, shapes: Sequence[BlockShape]) -> None:
    """Give a freshly built network the declared shapes; its weights are placeholders, to be loaded over."""
    for block, shape in zip(anatomy_of(network).blocks, shapes, strict=True):
        if shape.heads != block.shape.heads:
            keep_heads(block, range(shape.heads))
        if shape.feed_forward != block.shape.feed_forward:
            keep_feed_forward(block, torch.arange(shape.feed_forward))
