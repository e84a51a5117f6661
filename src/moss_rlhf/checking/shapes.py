"""What each stage leaves of the network, or why it can't. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from moss_rlhf.checking.network import State, initial_state
from moss_rlhf.checking.source import source_of
from moss_rlhf.errors import RecipeError
from moss_rlhf.model.anatomy import BlockShape, family_of
from moss_rlhf.model.config import read_config
from moss_rlhf.model.cost import units_kept
from moss_rlhf.model.limits import (
    beyond_budget,
    depth_fault,
    matrix_sizes,
    nothing_removed,
    removable_share,
    shortening_fault,
)
from moss_rlhf.recipe import (
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    ShortenSpec,
    stage_kind,
    stage_spec,
)
from moss_rlhf.recipe.compression import BUDGETS, SHARES
from moss_rlhf.recipe.pattern import misfit, parse_pattern


def state_after(spec: object, state: State, field: str, config: Mapping[str, Any]) -> State:
    """The network as the next stage finds it.

    raises   RecipeError where the stage can't be done to it.
    """
    if isinstance(spec, NarrowSpec):
        return _narrowed(spec, state, field)
    if isinstance(spec, ShortenSpec):
        return _shortened(spec, state, field, config)
    if isinstance(spec, PruneSpec):
        _check_pattern(spec, state, field)
    if isinstance(spec, QuantizeSpec) and spec.scheme == "int4":
        _check_groups(spec.group_size, state, field)
    if isinstance(spec, FinetuneSpec) and spec.quantization_aware and spec.quantization_aware.scheme == "int4":
        _check_groups(spec.quantization_aware.group_size, state, f"{field}.quantization_aware")
    return state


def check_budgets(recipe: Recipe, length: float) -> None:
    """Whether budgets of operations and weights can be met; `length` are the tokens of a text on average.

    raises   RecipeError where even the smallest widths cost more.
    """
    place = source_of(recipe)
    config = read_config(place)
    state = initial_state(place, config, recipe.task, labels=2)
    for index, stage in enumerate(recipe.stages):
        spec, field = stage_spec(stage), f"stages.{index}.{stage_kind(stage)}"
        for name in ("macs", "parameters") if isinstance(spec, NarrowSpec) else ():
            share, most = getattr(spec, name), removable_share(state.dimensions, name, spec.multiple_of, length)
            if share > most:
                raise RecipeError(f"{field}: {beyond_budget(name, share, most, spec.multiple_of)}")
        state = state_after(spec, state, field, config)


def _matrices(state: State) -> Iterator[tuple[int, int]]:
    """(out, in) of the matrices of different sizes, the largest first."""
    found = {size for shape in state.shapes for size in matrix_sizes(shape, state.dimensions)}
    return iter(sorted(found, reverse=True))


def _check_pattern(spec: PruneSpec, state: State, field: str) -> None:
    """Whether every matrix takes the pattern, and has a weight to lose."""
    pattern = parse_pattern(spec.pattern)
    share = pattern.sparsity if spec.sparsity is None else spec.sparsity
    for out, width in _matrices(state):
        if fault := misfit(out, width, pattern, share or 0.0):
            name = "pattern" if "pattern" in fault else "sparsity"
            raise RecipeError(f"{field}.{name}: a matrix of the blocks {fault}")


def _check_groups(group_size: int, state: State, field: str) -> None:
    """Groups must fill the rows of every matrix."""
    widths = sorted({width for _, width in _matrices(state)})
    for width in widths:
        if width % group_size:
            raise RecipeError(
                f"{field}.group_size: {group_size} does not divide rows of {width} weights. Give a divisor of "
                f"{', '.join(map(str, widths))}."
            )


# --- shorten -------------------------------------------------------------------------------------------------------


def _shortened(spec: ShortenSpec, state: State, field: str, config: Mapping[str, Any]) -> State:
    """Which go is not known yet: foretold as if the last ones, of an encoder-decoder the decoder's unless told."""
    family, shapes = family_of(config["model_type"]), state.shapes
    scaled = bool(config.get("scale_attn_by_inverse_layer_idx"))
    if fault := depth_fault(shared=family.shared, scaled_by_layer=scaled):
        raise RecipeError(f"{field}: {config['model_type']}: {fault}")
    crossing = sum(bool(shape.cross_heads) for shape in shapes)  # of a decoder beside an encoder
    counts = [len(shapes) - crossing, crossing] if crossing else [len(shapes)]
    layers = {str(stack.name): count for stack, count in zip(family.stacks, counts, strict=True)}
    if fault := shortening_fault(
        spec.remove, layers, stack=spec.stack, how=spec.how, score=spec.score, first_stays=family.first_stays
    ):
        raise RecipeError(f"{field}: {fault}")
    _check_merging(spec, state, field)
    if spec.stack == "encoder" and crossing:
        return state.with_shapes(shapes[spec.remove :])
    from_decoder = min(spec.remove, crossing - 1) if crossing else spec.remove
    return state.with_shapes(shapes[spec.remove - from_decoder : len(shapes) - from_decoder])


def _check_merging(spec: ShortenSpec, state: State, field: str) -> None:
    """Formulas of weights want neighbours of one shape; a fit changes one block alone."""
    neighbours = zip(state.shapes, state.shapes[1:], strict=False)
    alike = state.even and any(first == second for first, second in neighbours)
    if spec.how in ("merge_average", "merge_collapse") and not alike:
        raise RecipeError(
            f"{field}.how: {spec.how} takes neighbours of equal widths, and narrowing has left the blocks different "
            "ones. Put shorten before narrow, narrow by shares of heads and feed_forward, or give merge_least_squares."
        )


# --- narrow --------------------------------------------------------------------------------------------------------


def _narrowed(spec: NarrowSpec, state: State, field: str) -> State:
    budget = max(getattr(spec, name) for name in BUDGETS)  # spent where it costs least: foretold as if evenly
    heads, neurons = (budget, budget) if budget else (spec.heads, spec.feed_forward)
    queries, hidden = state.dimensions.queries_per_key, state.dimensions.hidden
    narrowed = tuple(_narrower(shape, heads, neurons, queries, spec.multiple_of) for shape in state.shapes)
    features = units_kept(hidden, spec.hidden, spec.multiple_of) if spec.hidden else hidden
    if narrowed == state.shapes and features == hidden and not budget:
        shares = {name: getattr(spec, name) for name in SHARES}
        raise RecipeError(f"{field}: {nothing_removed(shares, state.shapes[0], hidden)}")
    return state.with_shapes(narrowed, features, even=state.even and not budget)


def _narrower(shape: BlockShape, heads: float, neurons: float, queries: int, multiple_of: int) -> BlockShape:
    return BlockShape(
        _heads_kept(shape.heads, heads, queries),
        units_kept(shape.feed_forward, neurons, multiple_of),
        units_kept(shape.cross_heads, heads) if shape.cross_heads else 0,
    )


def _heads_kept(count: int, removed: float, queries: int) -> int:
    """Query heads go with the key-value head that they share, those of the last one singly."""
    return units_kept(count // queries, removed) * queries if count > queries else units_kept(count, removed)
