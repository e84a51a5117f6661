"""What a network costs: multiply-accumulate operations, parameters, bytes. Pure arithmetic on shapes, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moss_rlhf.model.anatomy import BlockShape


@dataclass(frozen=True)
class Dimensions:
    """The shapes that decide an encoder's cost."""

    hidden: int
    head_size: int
    blocks: tuple[BlockShape, ...]
    head_parameters: int  # weights of the pooler and classifier, used once a text
    projection_parameters: int = 0  # weights below the blocks that multiply every token: ELECTRA's, to the hidden size


def block_parameters(shape: BlockShape, hidden: int, head_size: int) -> int:
    """Weights of one block's six matrices (biases and norms left out)."""
    return 4 * hidden * shape.heads * head_size + 2 * hidden * shape.feed_forward


def block_macs(shape: BlockShape, hidden: int, head_size: int, length: float) -> float:
    """Multiply-accumulates of one block for one token of a text of `length` tokens, attention included."""
    return block_parameters(shape, hidden, head_size) + 2 * length * shape.heads * head_size


def macs_per_token(dimensions: Dimensions, length: float) -> float:
    """Multiply-accumulates of the network per token, texts of `length` tokens; embeddings are look-ups and free."""
    blocks = sum(block_macs(shape, dimensions.hidden, dimensions.head_size, length) for shape in dimensions.blocks)
    return dimensions.projection_parameters + blocks + dimensions.head_parameters / length


def training_flops(dimensions: Dimensions, length: float, tokens: float, lowest_trained: int = 0) -> float:
    """Operations of forward and backward over `tokens` tokens: 2 a multiply-accumulate, the backward twice the forward.

    lowest_trained   index of the lowest block that trains, below it there is no backward; the number of blocks: only
                     the head trains.
    """
    forward = macs_per_token(dimensions, length)
    frozen = sum(
        block_macs(shape, dimensions.hidden, dimensions.head_size, length)
        for shape in dimensions.blocks[:lowest_trained]
    )
    return 2 * tokens * (forward + 2 * (forward - frozen))


def training_bytes(parameters: int, hidden: int, layers: int, tokens: int) -> int:
    """A rough peak for AdamW in float32: weights, gradients, two moments, and what is kept for backward.

    That is 34 bytes a token, layer and hidden unit in half precision (Korthikanti et al. 2022, arXiv:2205.05198,
    eq. 1), twice as many in float32; attention scores are left out.
    """
    return 16 * parameters + 68 * hidden * layers * tokens


def all_block_parameters(shape: BlockShape, hidden: int, head_size: int) -> int:
    """Every parameter of one block: matrices, biases, two norms."""
    attention = shape.heads * head_size
    return (
        block_parameters(shape, hidden, head_size) + 3 * attention + hidden + shape.feed_forward + hidden + 4 * hidden
    )


def units_kept(units: int, removed: float, multiple_of: int = 1) -> int:
    """How many of `units` stay when the share `removed` goes, rounded down to whole units.

    Rounded up to a multiple of `multiple_of` where there are as many; at least one stays.
    """
    kept = max(1, units - int(units * removed + 1e-9))  # 0.29 · 100 is 28.999…
    return min(units, -(-kept // multiple_of) * multiple_of)
