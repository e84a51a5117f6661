"""How far a network can be narrowed and shortened. Pure arithmetic on shapes: `moss check` and the methods ask here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.cost import Dimensions, block_macs, block_parameters


def matrix_sizes(shape: BlockShape, dimensions: Dimensions) -> set[tuple[int, int]]:
    """(out, in) of one block's matrices; those that a family fuses are taken apart."""
    hidden, size = dimensions.hidden, dimensions.head_size
    pairs = max(1, shape.heads // dimensions.queries_per_key)
    into = {shape.heads * size, pairs * size, shape.cross_heads * size, shape.feed_forward} - {0}
    out_of = {shape.heads * size, shape.cross_heads * size, shape.feed_forward} - {0}
    return {(width, hidden) for width in into} | {(hidden, width) for width in out_of}


def removable_share(dimensions: Dimensions, of: str, multiple_of: int, length: float) -> float:
    """The share that narrowing can remove of all blocks: one head an attention and one multiple of neurons stay.

    of       macs or parameters.
    length   tokens of a text, for what attention costs.
    """
    smallest = [_smallest(shape, dimensions.queries_per_key, multiple_of) for shape in dimensions.blocks]
    return 1 - _cost(replace(dimensions, blocks=tuple(smallest)), of, length) / _cost(dimensions, of, length)


def beyond_budget(of: str, share: float, most: float, multiple_of: int) -> str:
    """The sentence for a budget that even the smallest widths exceed; `most` is what they remove."""
    return (
        f"{of} {share} can't be removed: with one head and {multiple_of} neurons in every block, {most:.3f} of it is "
        "gone. Give a smaller share, or a smaller multiple_of."
    )


def _smallest(shape: BlockShape, queries: int, multiple_of: int) -> BlockShape:
    return BlockShape(
        min(shape.heads, queries), min(shape.feed_forward, multiple_of), cross_heads=min(shape.cross_heads, 1)
    )


def _cost(dimensions: Dimensions, of: str, length: float) -> float:
    if of == "parameters":
        return sum(block_parameters(shape, dimensions) for shape in dimensions.blocks)
    return sum(block_macs(shape, dimensions, length) for shape in dimensions.blocks)


def nothing_removed(shares: Mapping[str, float], shape: BlockShape, hidden: int) -> str:
    """The sentence for shares, by name, that remove less than one unit of a block of this shape."""
    asked = " and ".join(f"{name} {share}" for name, share in shares.items() if share)
    units = f"{shape.heads} heads, {shape.feed_forward} neurons and a hidden size of {hidden}"
    return f"{asked} would remove nothing of {units}. Give larger shares, or a smaller multiple_of."


def depth_fault(*, shared: bool, scaled_by_layer: bool) -> str | None:
    """Why a network can't lose any block, as one sentence, else None.

    shared            whether one block is all layers; scaled_by_layer: `scale_attn_by_inverse_layer_idx`.
    """
    if shared:
        return "its layers share one block: there is none to drop or merge. Narrow, prune or quantize it."
    if scaled_by_layer:
        return "its attention is scaled by the layer's number (scale_attn_by_inverse_layer_idx): none can go."
    return None


def shortening_fault(
    remove: int, layers: Mapping[str, int], *, stack: str, how: str, score: str, first_stays: bool
) -> str | None:
    """Why `remove` blocks can't be dropped or merged, as one sentence, else None.

    layers        of each stack, by its name.
    first_stays   whether the first block can't go, and takes no other in.
    """
    if stack not in ("auto", *layers):
        return f"the model has no {stack}, only one {next(iter(layers))}. Leave stack at 'auto'."
    chosen = [count for name, count in layers.items() if stack in ("auto", name)]
    merges = how not in ("drop", "auto")
    most = _most(chosen, fixed=int(merges and first_stays), one_stack=score == "angular")
    depth = sum(chosen)
    if most < 1:
        return f"of {depth} layers none can be {'merged' if merges else 'removed'}; leave this stage out."
    if not 0 < remove <= most:
        each = ", of each stack" if len(chosen) > 1 else ""
        return (
            f"can't remove {remove} of {depth} layers; at least one must stay and one must go{each}. Give 1 to {most}."
        )
    return None


def _most(layers: Sequence[int], fixed: int, one_stack: bool) -> int:
    """Blocks that can go; angular distance takes neighbours, which are of one stack."""
    spare = [max(0, count - 1 - fixed) for count in layers]
    return max(spare) if one_stack else sum(spare)
