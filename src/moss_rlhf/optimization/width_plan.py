"""What a narrowing must come to: the same shares of every block, or the least loss under one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import Dimensions, block_macs, block_parameters, units_kept
from moss_rlhf.model.latency import Measure, PartShape, latency_tables, torch_seconds
from moss_rlhf.model.limits import beyond_budget
from moss_rlhf.optimization.unit_scores import Part, groups_of
from moss_rlhf.optimization.width_allocation import cheapest_widths, losses_of, widths_of
from moss_rlhf.recipe.compression import Budget

Group = tuple[Part, ...]
Costs = NDArray[np.float64]


@dataclass(frozen=True)
class Uniform:
    """The same share of every block. Units before and after, by the name of a group's first part."""

    first: Mapping[str, int]
    last: Mapping[str, int]

    @property
    def narrows(self) -> bool:
        return self.first != self.last

    def widths(self, groups: Sequence[Group], scores: Mapping[str, Tensor], done: float) -> list[int]:
        """The groups' widths when the share `done` of the way is gone."""
        del scores
        return [self._width(group[0], done) for group in groups]

    def _width(self, part: Part, done: float) -> int:
        first, last = self.first[part.name], self.last[part.name]
        return last if done == 1 else min(part.units, round(first + (last - first) * done))


@dataclass(frozen=True)
class Budgeted:
    """Widths where they cost least.

    options, costs   by the name of a group's first part: its widths, ascending, and what the group costs at each.
    now, last        what the costs sum to before, and may sum to in the end.
    """

    now: float
    last: float
    options: Mapping[str, list[int]] = field(default_factory=dict)
    costs: Mapping[str, Costs] = field(default_factory=dict)

    @property
    def narrows(self) -> bool:
        return True

    def widths(self, groups: Sequence[Group], scores: Mapping[str, Tensor], done: float) -> list[int]:
        """The groups' widths when the share `done` of the way is gone; scores by the names of the groups' first parts.

        A group's present width is always one of its options.
        """
        names = [group[0].name for group in groups]
        options = [
            [width for width in self.options[name] if width <= group[0].units]
            for name, group in zip(names, groups, strict=True)
        ]
        losses = [losses_of(scores[name], widths) for name, widths in zip(names, options, strict=True)]
        costs = [self.costs[name][: len(widths)] for name, widths in zip(names, options, strict=True)]
        picks = cheapest_widths(losses, costs, self.now + (self.last - self.now) * done)
        return [widths[pick] for widths, pick in zip(options, picks, strict=True)]


Plan = Uniform | Budgeted


def uniform_plan(model: Model, heads: float, feed_forward: float, multiple_of: int) -> Uniform:
    """Shares of every attention's heads and feed-forward's neurons that go, in [0, 1)."""
    first = {group[0].name: group[0] for group in groups_of(model.anatomy)}
    last = {
        name: units_kept(part.units, heads) if part.attention else units_kept(part.units, feed_forward, multiple_of)
        for name, part in first.items()
    }
    return Uniform({name: part.units for name, part in first.items()}, last)


def budgeted_plan(
    model: Model, of: Budget, share: float, *, multiple_of: int, length: float, measure: Measure | None = None
) -> Budgeted:
    """`share` of what the blocks cost goes.

    length    tokens of a text, for what attention costs.
    measure   of latency: seconds of a part at a width; PyTorch's matrix products unless given.
    raises    ModelError where the smallest widths still cost more: one unit and one multiple of neurons a block stay.
    """
    groups = groups_of(model.anatomy)
    options = {group[0].name: widths_of(group[0].units, 1 if group[0].attention else multiple_of) for group in groups}
    if of == "latency":
        base, costs = 0.0, _seconds(model, groups, options, measure or torch_seconds(length=max(1, round(length))))
    else:
        cost = partial(_cost, dimensions=model.dimensions, of=of, length=length)
        base, costs = len(model.anatomy.blocks) * cost(BlockShape(0, 0)), _counted(groups, options, cost)
    now, smallest = sum(float(cost[-1]) for cost in costs.values()), sum(float(cost[0]) for cost in costs.values())
    last = (now + base) * (1 - share) - base
    if smallest > last:
        raise ModelError(f"narrow: {beyond_budget(of, share, (now - smallest) / (now + base), multiple_of)}")
    return Budgeted(now, last, options, costs)


def _cost(shape: BlockShape, *, dimensions: Dimensions, of: Budget, length: float) -> float:
    return block_parameters(shape, dimensions) if of == "parameters" else block_macs(shape, dimensions, length)


def _counted(groups: Sequence[Group], options: Mapping[str, list[int]], cost: partial[float]) -> dict[str, Costs]:
    """What each width of a group costs above a block without units (whose one key-value head may serve all)."""
    nothing = cost(BlockShape(0, 0))

    def of_part(part: Part, width: int) -> float:
        units = width * (part.attention.heads_per_unit if part.attention else 1)
        return cost(replace(BlockShape(0, 0), **{part.kind: units})) - nothing

    return {
        group[0].name: np.array([len(group) * of_part(group[0], width) for width in options[group[0].name]])
        for group in groups
    }


def _seconds(
    model: Model, groups: Sequence[Group], options: Mapping[str, list[int]], measure: Measure
) -> dict[str, Costs]:
    shapes = {group[0].name: _part_shape(model.anatomy.hidden_size, group[0]) for group in groups}
    tables = latency_tables(shapes, options, measure)
    return {group[0].name: tables[group[0].name] * len(group) for group in groups}


def _part_shape(hidden: int, part: Part) -> PartShape:
    if part.attention:
        return PartShape(hidden, part.units, part.attention.head_size, part.attention.heads_per_unit)
    rows = sum(matrix.out_features for matrix in part.block.feed_forward.ups)
    return PartShape(hidden, part.units, matrices=1 + rows // part.units)
