"""The only place that knows architectures: where a family keeps its blocks, projections and head.

A new family is one row of FAMILIES. Names are dotted paths: `blocks` from the base model (the network without its
head), the rest from one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moss_rlhf.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Family:
    """One row: where the parts are, and what the stock config calls the sizes."""

    blocks: str
    attention: str  # the module that counts its heads
    query: str
    key: str
    value: str
    attention_output: str
    up: str
    down: str
    head_count: str = "num_attention_heads"  # attribute of the attention module
    heads: str = "num_attention_heads"  # keys of config.json …
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    feed_forward: str = "intermediate_size"


_BERT = Family(
    blocks="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    up="intermediate.dense",
    down="output.dense",
)
_DISTILBERT = Family(
    blocks="transformer.layer",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    up="ffn.lin1",
    down="ffn.lin2",
    head_count="n_heads",
    heads="n_heads",
    hidden="dim",
    layers="n_layers",
    feed_forward="hidden_dim",
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": _DISTILBERT,
}


def family_of(model_type: str) -> Family:
    """The row of a config's `model_type`; ModelError names the known ones."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"model type {model_type!r} is not known here yet. Known families: {known}.")
    return FAMILIES[model_type]


@dataclass(frozen=True)
class BlockShape:
    """What can differ from block to block."""

    heads: int
    feed_forward: int


@dataclass(frozen=True)
class Block:
    """One transformer block and its parts, live modules of the network."""

    module: nn.Module
    attention: nn.Module
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    up: nn.Linear
    down: nn.Linear
    head_size: int
    head_count: str

    @property
    def shape(self) -> BlockShape:
        return BlockShape(self.query.out_features // self.head_size, self.up.out_features)

    @property
    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.attention_output, self.up, self.down


@dataclass(frozen=True)
class Anatomy:
    """What our methods need to know of one network."""

    family: Family
    blocks: tuple[Block, ...]
    embeddings: tuple[tuple[str, nn.Parameter], ...]  # named parameters below the blocks
    head: tuple[tuple[str, nn.Parameter], ...]  # named parameters above the blocks: pooler and classifier

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return tuple(block.shape for block in self.blocks)


def anatomy_of(network: Any) -> Anatomy:
    """Find the parts of a Hugging Face network; ModelError if its family is unknown."""
    family = family_of(network.config.model_type)
    base, prefix = network.base_model, f"{network.base_model_prefix}."
    stack = base.get_submodule(family.blocks)
    head_size = getattr(network.config, family.hidden) // getattr(network.config, family.heads)
    in_blocks = {id(parameter) for parameter in stack.parameters()}
    outside = [(name, parameter) for name, parameter in network.named_parameters() if id(parameter) not in in_blocks]
    is_head = [not name.startswith(prefix) or name.startswith(f"{prefix}pooler.") for name, _ in outside]
    return Anatomy(
        family=family,
        blocks=tuple(_block(module, family, head_size) for module in stack),
        embeddings=tuple(part for part, above in zip(outside, is_head, strict=True) if not above),
        head=tuple(part for part, above in zip(outside, is_head, strict=True) if above),
    )


def _block(module: nn.Module, family: Family, head_size: int) -> Block:
    part: Any = module.get_submodule
    return Block(
        module=module,
        attention=part(family.attention),
        query=part(family.query),
        key=part(family.key),
        value=part(family.value),
        attention_output=part(family.attention_output),
        up=part(family.up),
        down=part(family.down),
        head_size=head_size,
        head_count=family.head_count,
    )
