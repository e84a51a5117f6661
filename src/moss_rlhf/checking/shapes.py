"""What each stage leaves of the blocks, or why it can't. No torch."""

from __future__ import annotations

from typing import Any

from moss_rlhf.errors import RecipeError
from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.config import head_size, hidden_size, queries_per_key
from moss_rlhf.model.cost import units_kept
from moss_rlhf.recipe import FinetuneSpec, NarrowSpec, QuantizeSpec, ShortenSpec


def shapes_after(
    spec: object, shapes: tuple[BlockShape, ...], field: str, config: dict[str, Any]
) -> tuple[BlockShape, ...]:
    if isinstance(spec, NarrowSpec):
        return _narrowed(spec, shapes, field, queries_per_key(config))
    if isinstance(spec, ShortenSpec):
        return _shortened(spec, shapes, field)
    if isinstance(spec, QuantizeSpec) and spec.scheme == "int4":
        _check_groups(spec.group_size, shapes, config, field)
    if isinstance(spec, FinetuneSpec) and spec.quantization_aware and spec.quantization_aware.scheme == "int4":
        _check_groups(spec.quantization_aware.group_size, shapes, config, f"{field}.quantization_aware")
    return shapes


def _check_groups(group_size: int, shapes: tuple[BlockShape, ...], config: dict[str, Any], field: str) -> None:
    """Groups must fill the rows of every matrix."""
    widths = {hidden_size(config)} | {
        width for shape in shapes for width in (shape.heads * head_size(config), shape.feed_forward)
    }
    for width in sorted(widths):
        if width % group_size:
            raise RecipeError(
                f"{field}.group_size: {group_size} does not divide rows of {width} weights. Give a divisor of "
                f"{', '.join(map(str, sorted(widths)))}."
            )


def _shortened(spec: ShortenSpec, shapes: tuple[BlockShape, ...], field: str) -> tuple[BlockShape, ...]:
    """Which go is not known yet: foretold as if the last ones, of an encoder-decoder the decoder's unless told."""
    crossing = sum(bool(shape.cross_heads) for shape in shapes)  # of a decoder beside an encoder
    stacks = {"encoder": len(shapes) - crossing, "decoder": crossing} if crossing else {"": len(shapes)}
    chosen = [stack for stack in stacks if spec.stack in ("auto", stack) or not stack]
    most = sum(stacks[stack] - 1 for stack in chosen)
    if spec.remove > most:
        of = f"of {sum(stacks[stack] for stack in chosen)} layers"
        each = " in a stack" if len(chosen) > 1 else ""
        raise RecipeError(f"{field}.remove: {spec.remove} {of} would leave none{each}. Give 1 to {most}.")
    if spec.stack == "encoder" and crossing:
        return shapes[spec.remove :]
    from_decoder = min(spec.remove, crossing - 1) if crossing else spec.remove
    return shapes[spec.remove - from_decoder : len(shapes) - from_decoder]


def _heads_kept(count: int, removed: float, queries: int) -> int:
    """Query heads go with the key-value head that they share, those of the last one singly."""
    return units_kept(count // queries, removed) * queries if count > queries else units_kept(count, removed)


def _narrowed(spec: NarrowSpec, shapes: tuple[BlockShape, ...], field: str, queries: int) -> tuple[BlockShape, ...]:
    budget = max(spec.macs, spec.parameters, spec.latency)  # spent where it costs least: foretold as if evenly
    heads, neurons = (budget, budget) if budget else (spec.heads, spec.feed_forward)
    narrowed = tuple(
        BlockShape(
            _heads_kept(shape.heads, heads, queries),
            units_kept(shape.feed_forward, neurons, spec.multiple_of),
            units_kept(shape.cross_heads, heads) if shape.cross_heads else 0,
        )
        for shape in shapes
    )
    if narrowed == shapes and not spec.hidden:
        raise RecipeError(
            f"{field}: heads {spec.heads} and feed_forward {spec.feed_forward} remove less than one unit of "
            f"{shapes[0].heads} heads and {shapes[0].feed_forward} neurons. Give larger shares."
        )
    return narrowed
