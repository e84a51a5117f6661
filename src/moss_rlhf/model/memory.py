"""The peak memory of measuring a network on rows: what lives together, counted in bytes. Pure arithmetic, no torch.

All is float32. The libraries' own memory and what allocators keep are in `LIBRARY_BYTES`, measured (docs/LOG.md);
benchmarks/forecast.py holds the sums against runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.cost import Dimensions

LIBRARY_BYTES = 500 * 2**20  # torch, transformers and datasets, once the data is read and tokenized
_FLOAT = 4
_ROWS_AT_ONCE, _TOKENS_AT_ONCE = 32, 2048
_CACHE_BYTES = 2**30  # of activations between two blocks, for each stack; what exceeds it lies on disk
_PASS_COPIES = 6  # of what enters a feed-forward: the block's own, the activation's, those of the statistics
# Bytes a token, layer and hidden unit for backward, measured: Korthikanti et al. 2022 (arXiv:2205.05198, eq. 1) count
# 68, masks and temporaries add to it. GPT-2's and T5's activations and norms run in pieces, each keeping its input.
_KEPT, _KEPT_IN_PIECES = 100, 160
_OUTPUT_GRADIENTS = 70  # more, where those of all matrices' outputs and of what enters units stay until the end
_TABLE_COPIES = 4  # of a rounded embedding table
_LOGIT_COPIES = 3  # the logits, their log probabilities, the gradient


@dataclass(frozen=True)
class Network:
    """parameters: all of them; vocabulary: tokens that logits are given for, 0 of a classifier."""

    dimensions: Dimensions
    parameters: int
    vocabulary: int

    @property
    def weights(self) -> int:
        return _FLOAT * self.parameters

    @property
    def widest(self) -> BlockShape:
        return max(self.dimensions.blocks, key=lambda shape: (shape.feed_forward, shape.heads))


@dataclass(frozen=True)
class Sample:
    """Rows that are measured on: how many, tokens of a row on average and of the longest."""

    rows: int
    length: float
    longest: float

    @property
    def batch_tokens(self) -> float:
        """Of the batch of the longest rows, padding included."""
        return min(self.rows, rows_at_once(self.longest)) * self.longest


def rows_at_once(longest: float) -> int:
    """Rows of a batch that a network is measured on: wide feed-forwards hold several copies of what goes through."""
    return max(1, min(_ROWS_AT_ONCE, _TOKENS_AT_ONCE // max(1, int(longest))))


def block_inputs(shape: BlockShape, dimensions: Dimensions) -> list[int]:
    """Widths of the different inputs that a block's matrices read."""
    crossing = [dimensions.hidden, dimensions.hidden, shape.cross_heads * dimensions.head_size]
    own = [dimensions.hidden, shape.heads * dimensions.head_size, dimensions.hidden, shape.feed_forward]
    return own + (crossing if shape.cross_heads else [])


def states_bytes(network: Network, sample: Sample) -> int:
    """The rows between two blocks: of an encoder-decoder, of each stack."""
    stacks = 2 if any(shape.cross_heads for shape in network.dimensions.blocks) else 1
    kept = _FLOAT * sample.rows * sample.length * network.dimensions.hidden
    return int(stacks * min(kept, _CACHE_BYTES))


def pass_bytes(network: Network, sample: Sample) -> int:
    """One batch going through one block, its inputs being counted."""
    width = network.widest.feed_forward + network.dimensions.hidden
    return int(_FLOAT * _PASS_COPIES * sample.batch_tokens * width)


def grams_bytes(network: Network) -> int:
    """Σ x xᵀ of a block's inputs."""
    return _FLOAT * sum(width**2 for width in block_inputs(network.widest, network.dimensions))


def solver_bytes(network: Network) -> int:
    """What SparseGPT and GPTQ hold for one matrix: four of the gram's size, four of the weight's."""
    widths = block_inputs(network.widest, network.dimensions)
    largest = max(widths)
    out = network.dimensions.hidden if largest == network.widest.feed_forward else largest
    return 4 * _FLOAT * (largest**2 + largest * out)


def logits_bytes(network: Network, sample: Sample) -> int:
    return int(_FLOAT * _LOGIT_COPIES * sample.batch_tokens * network.vocabulary)


def gradient_bytes(network: Network, sample: Sample, *, of_outputs: bool = False) -> int:
    """Forward and backward of one batch; language models are taken to be those that keep more."""
    layers, hidden = len(network.dimensions.blocks), network.dimensions.hidden
    kept = (_KEPT_IN_PIECES if network.vocabulary else _KEPT) + (_OUTPUT_GRADIENTS if of_outputs else 0)
    return int(kept * hidden * layers * sample.batch_tokens) + logits_bytes(network, sample)


def repair_bytes(network: Network, sample: Sample) -> int:
    """An uncut network beside the cut one, both gone through, and a least-squares fit in float64."""
    width = max(block_inputs(network.widest, network.dimensions))
    fit = (1 + 3 * 2) * _FLOAT * width**2
    return network.weights + 2 * states_bytes(network, sample) + pass_bytes(network, sample) + fit


def table_bytes(network: Network) -> int:
    """Rounding the table of tokens."""
    return _TABLE_COPIES * _FLOAT * network.vocabulary * network.dimensions.hidden


def calibration_bytes(network: Network, sample: Sample, *, grams: bool = False, solves: bool = False) -> int:
    """Block by block over the rows; with the grams of what enters the matrices, and a solver that uses them."""
    found = states_bytes(network, sample) + pass_bytes(network, sample)
    return found + (grams_bytes(network) if grams else 0) + (solver_bytes(network) if solves else 0)
