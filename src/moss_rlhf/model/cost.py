"""What a network costs: multiply-accumulate operations, parameters, bytes. Pure arithmetic on shapes, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from moss_rlhf.model.anatomy import BlockShape


@dataclass(frozen=True)
class Dimensions:
    """The shapes that decide a network's cost."""

    hidden: int
    head_size: int
    blocks: tuple[BlockShape, ...]
    head_parameters: int  # weights of the pooler and classifier, used once a text
    projection_parameters: int = 0  # weights outside the blocks that multiply every token: of a language model's head
    gated: bool = False  # three matrices in the feed-forward instead of two
    queries_per_key: int = 1  # query heads that share one key-value head
    repeats: int = 1  # how often the blocks are gone through


def block_parameters(shape: BlockShape, dimensions: Dimensions) -> int:
    """Weights of one block's matrices (biases and norms left out)."""
    heads = 2 * shape.heads + 2 * max(1, shape.heads // dimensions.queries_per_key) + 4 * shape.cross_heads
    return dimensions.hidden * (heads * dimensions.head_size + (3 if dimensions.gated else 2) * shape.feed_forward)


def block_macs(shape: BlockShape, dimensions: Dimensions, length: float) -> float:
    """Multiply-accumulates of one block for one token of a text of `length` tokens, attention included."""
    attending = 2 * length * (shape.heads + shape.cross_heads) * dimensions.head_size
    return dimensions.repeats * (block_parameters(shape, dimensions) + attending)


def macs_per_token(dimensions: Dimensions, length: float) -> float:
    """Multiply-accumulates of the network per token, texts of `length` tokens; embeddings are look-ups and free.

    An encoder-decoder counts as if source and target were equally long. What a batch multiplies once, whatever its
    texts, is left out: DeBERTa's projections of relative positions.
    """
    blocks = sum(block_macs(shape, dimensions, length) for shape in dimensions.blocks)
    return dimensions.projection_parameters + blocks + dimensions.head_parameters / length


def training_flops(dimensions: Dimensions, length: float, tokens: float, lowest_trained: int = 0) -> float:
    """Operations of forward and backward over `tokens` tokens: 2 a multiply-accumulate, the backward twice the forward.

    lowest_trained   index of the lowest block that trains, below it there is no backward; the number of blocks: only
                     the head trains.
    """
    forward = macs_per_token(dimensions, length)
    frozen = sum(block_macs(shape, dimensions, length) for shape in dimensions.blocks[:lowest_trained])
    return 2 * tokens * (forward + 2 * (forward - frozen))


def prefix_flops(dimensions: Dimensions, length: float, tokens: float, blocks: int) -> float:
    """Operations of a forward pass of the lowest `blocks` blocks over `tokens` tokens, of texts of `length`."""
    return 2 * tokens * sum(block_macs(shape, dimensions, length) for shape in dimensions.blocks[:blocks])


def training_bytes(parameters: int, hidden: int, layers: int, tokens: int) -> int:
    """A rough peak for AdamW in float32: weights, gradients, two moments, and what is kept for backward.

    That is 34 bytes a token, layer and hidden unit in half precision (Korthikanti et al. 2022, arXiv:2205.05198,
    eq. 1), twice as many in float32; attention scores are left out.
    """
    return 16 * parameters + 68 * hidden * layers * tokens


def all_block_parameters(shape: BlockShape, dimensions: Dimensions) -> int:
    """Every parameter of one block: matrices, biases, a norm of two vectors a part.

    Exact where each matrix has a bias, as BERT's, GPT-2's and BART's; Llama's and T5's kind has under 1 % fewer.
    """
    hidden, parts = dimensions.hidden, 3 if shape.cross_heads else 2
    biases = 3 * (shape.heads + shape.cross_heads) * dimensions.head_size + shape.feed_forward + parts * hidden
    return block_parameters(shape, dimensions) + biases + 2 * parts * hidden


def units_kept(units: int, removed: float, multiple_of: int = 1) -> int:
    """How many of `units` stay when the share `removed` goes, rounded down to whole units.

    Rounded up to a multiple of `multiple_of` where there are as many; at least one stays.
    """
    kept = max(1, units - int(units * removed + 1e-9))  # 0.29 · 100 is 28.999…
    return min(units, -(-kept // multiple_of) * multiple_of)
