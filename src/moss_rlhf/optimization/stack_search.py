"""Which blocks go, or are merged: groups of old blocks, what they become, and the search for the cheapest.

A shortened network is a list of groups of its old blocks, in order: each group becomes one block, what is in no group
is dropped. What was merged before is merged anew from the old blocks: the order of the steps leaves no trace.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Anatomy, Block
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.surgery import keep_blocks, only_blocks
from moss_rlhf.optimization.block_states import own_tokens, replaced, traced
from moss_rlhf.optimization.calibration import labelled_batches, mean_loss
from moss_rlhf.optimization.layer_scores import angular_distance, block_influence, span_distances
from moss_rlhf.optimization.merging import Merged, average, collapse, fit_block, hindrance, merge_weights
from moss_rlhf.progress import Bar, Progress

Group = tuple[int, ...]  # positions in `anatomy.blocks`, neighbours in one stack, that become one block
Groups = tuple[Group, ...]

_FORMULAS: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "merge_average": average,
    "merge_collapse": collapse,
}
_ROWS_COMPARED = 64  # for the similarity of last states: LaCo compares few sentences
_INSTEAD = "Drop instead, merge by least squares, or shorten before narrowing."


# --- the ways ------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way of making blocks fewer. Nothing here changes the model for good but `commit`."""

    model: Model
    how: str
    stack: str
    sample: Any
    similarity: float | None = None
    _known: dict[Group, Merged] = field(default_factory=dict)
    _old_states: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.anatomy = self.model.anatomy
        self.blocks = self.anatomy.blocks
        self.eligible = _eligible(self.anatomy, self.stack)

    def of(self, group: Group) -> list[Block]:
        return [self.blocks[index] for index in group]

    def hindrance(self, group: Group) -> str | None:
        return hindrance(self.of(group)) if self.how in _FORMULAS else None

    def merged(self, group: Group) -> Merged:
        """What a group becomes; kept, for a greedy search asks again."""
        if group not in self._known:
            self._known[group] = self._merge(group)
        return self._known[group]

    def _merge(self, group: Group) -> Merged:
        members = self.of(group)
        if len(members) == 1:
            return Merged(members[0])
        if self.how in _FORMULAS:
            return merge_weights(members, _FORMULAS[self.how])
        batches = labelled_batches(self.model, self.sample)
        try:
            return fit_block(self.model.network, batches, members, self.model.pruned)
        except ValueError as error:
            raise ModelError(f"shorten: {_several(members)} can't be merged: {error}. Look for inf or nan.") from None

    def realised(self, groups: Groups) -> tuple[list[int], dict[nn.Parameter, Tensor]]:
        """(positions of the blocks that stay, the values of their parameters that are new)."""
        merged = [self.merged(group) for group in groups]
        values = {parameter: value for part in merged for parameter, value in part.weights.items()}
        return [group[self.of(group).index(part.base)] for group, part in zip(groups, merged, strict=True)], values

    @contextmanager
    def applied(self, groups: Groups) -> Iterator[None]:
        """The network shortened, for a while."""
        kept, values = self.realised(groups)
        with replaced(values), only_blocks(self.model.network, kept):
            yield

    def steps(self, groups: Groups) -> dict[str, Groups]:
        """Everything that makes `groups` one block fewer, by what it does."""
        if self.how == "drop":
            return dict(_drops(self, groups))
        steps = dict(_joins(self, groups))
        possible = {name: step for name, step in steps.items() if not any(map(self.hindrance, step))}
        if steps and not possible:
            reason = next(filter(None, (self.hindrance(group) for step in steps.values() for group in step)))
            raise ModelError(f"shorten: {self.how} needs neighbours of equal shapes; {reason}. {_INSTEAD}")
        return possible

    def alike(self, groups: Groups) -> float:
        """The mean cosine between the shortened network's last states and the old ones."""
        if not self._old_states:
            self._old_states = _last_states(self.model, self.sample)
        with self.applied(groups):
            new = _last_states(self.model, self.sample)
        cosine = [1 - block_influence(old, now) for old, now in zip(self._old_states, new, strict=True)]
        return float(torch.cat(cosine).mean())

    def _tell_origins(self, groups: Groups) -> None:
        """A merged block stands for all of its group: it ends where the last of them did."""
        for group in groups:
            members = self.of(group)
            base, last = self.merged(group).base, members[-1].origin
            if len(members) > 1 and last is not None:
                base.set_origin(last)

    def commit(self, groups: Groups) -> dict[str, object]:
        """Shorten the network; what became of pruned zeros, where merging touched any."""
        kept, values = self.realised(groups)
        touched = [parameter for parameter in self.model.pruned if parameter in values]
        before = sum(_zeros(parameter) for parameter in touched)
        for parameter, value in values.items():
            parameter.data = value  # never written in place: it may be a map of a file
        keep_blocks(self.model.network, kept)
        self._tell_origins(groups)
        left = {id(parameter) for parameter in self.model.network.parameters()}
        still = {id(parameter) for parameter in touched if _zeros(parameter)}
        lost = {id(parameter) for parameter in touched} - still
        self.model.pruned = [part for part in self.model.pruned if id(part) in left - lost]
        after = sum(_zeros(parameter) for parameter in touched)
        if after == before:
            return {}
        return {
            "pruned_zeros": f"{before} → {after}: of merged matrices only zeros that all of them share are left",
            "no_longer_pruned": len(lost),
        }


def _zeros(parameter: nn.Parameter) -> int:
    return parameter.numel() - int(torch.count_nonzero(parameter))


def _last_states(model: Model, sample: Any) -> list[Tensor]:
    """What leaves the last block on the first rows, (tokens, hidden) a batch; padding left out."""
    anatomy, states = model.anatomy, []
    last = anatomy.blocks[-1]
    few = sample.select(range(0, len(sample), max(1, len(sample) // _ROWS_COMPARED)))
    model.network.eval()
    for batch in labelled_batches(model, few):
        with torch.no_grad(), traced([last]) as (trace,):
            model.network(**batch[0])
        states.append(trace.left[own_tokens(anatomy, last, batch)])
    return states


# --- groups --------------------------------------------------------------------------------------------------------


def _eligible(anatomy: Anatomy, stack: str) -> set[int]:
    """Positions of the blocks that may go or be merged."""
    return {
        index
        for index, block in enumerate(anatomy.blocks)
        if stack in ("auto", block.stack) and not (anatomy.family.first_stays and block.index == 0)
    }


def _drops(way: Way, groups: Groups) -> Iterator[tuple[str, Groups]]:
    for group in groups:
        rest = tuple(other for other in groups if other != group)
        alone = all(way.blocks[other[0]].stack != way.blocks[group[0]].stack for other in rest)
        if group[0] in way.eligible and not alone:
            yield f"without {_one(way.blocks[group[0]])}", rest


def _joins(way: Way, groups: Groups) -> Iterator[tuple[str, Groups]]:
    for at, (below, above) in enumerate(pairwise(groups)):
        joined = below + above
        if way.eligible.issuperset(joined) and len({block.stack for block in way.of(joined)}) == 1:
            yield f"with {_several(way.of(joined))} merged", (*groups[:at], joined, *groups[at + 2 :])


def _absorb(way: Way, gone: set[int]) -> Groups:
    """Each block of `gone` becomes one with the group below it; above it, where there is none that may change."""
    groups: list[Group] = []
    waiting: Group = ()
    for index in range(len(way.blocks)):
        if index not in gone:
            groups.append((*waiting, index))
            waiting = ()
        elif groups and groups[-1][0] in way.eligible and way.blocks[index].stack == way.blocks[groups[-1][0]].stack:
            groups[-1] = (*groups[-1], index)
        else:
            waiting = (*waiting, index)
    return tuple(groups)


def _one(block: Block) -> str:
    return block.name.replace(".", " ")


def _several(blocks: Sequence[Block]) -> str:
    kind = blocks[0].name.partition(".")[0].replace("block", "blocks")
    return f"{kind} {blocks[0].index}–{blocks[-1].index}"


# --- the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """Where a search ended, and every candidate's score on the way."""

    way: Way
    groups: Groups
    scores: list[dict[str, float]]


def loss_of(way: Way, groups: Groups, sample: Any) -> float:
    """The mean loss of a network so shortened."""
    with way.applied(groups):
        return mean_loss(way.model, sample)


def search(
    way: Way, remove: int, score: str, progress: Progress, influence: Mapping[str, float] | None = None
) -> Found:
    """Influence   of every block by its name, for score sensitivity, which measures nothing itself."""
    if score == "loss":
        return _by_loss(way, remove, progress)
    if score == "sensitivity":
        spans: list[Group] = [(index,) for index in sorted(way.eligible)]
        return _by_influence(way, remove, spans, [(influence or {})[way.blocks[index].name] for (index,) in spans])
    return _by_states(way, remove, score, progress)


def _by_loss(way: Way, remove: int, progress: Progress) -> Found:
    groups: Groups = tuple((index,) for index in range(len(way.blocks)))
    scores: list[dict[str, float]] = []
    total = sum(len(way.eligible) - count for count in range(remove))
    with progress.bar(f"shortening: {way.how.replace('_', ' ')}", total) as bar:
        for _ in range(remove):
            groups, round_scores = _cheapest(way, groups, bar)
            scores.append(round_scores)
    return Found(way, groups, scores)


def _cheapest(way: Way, groups: Groups, bar: Bar) -> tuple[Groups, dict[str, float]]:
    """The step of lowest loss, the lowest in the network where several are, and all losses."""
    steps, alike = way.steps(groups), dict[str, float]()
    losses: dict[str, float] = {}
    for name, step in steps.items():
        if way.similarity is not None:
            alike[f"similarity {name}"] = way.alike(step)
        losses[f"loss {name}"] = loss_of(way, step, way.sample)
        bar.advance()
    open_to = [
        (loss, step)
        for (name, step), loss in zip(steps.items(), losses.values(), strict=True)
        if math.isfinite(loss) and alike.get(f"similarity {name}", 1.0) >= (way.similarity or -1.0)
    ]
    if not open_to:
        raise ModelError(_none_left(way, alike))
    return min(open_to, key=lambda pair: pair[0])[1], losses | alike


def _none_left(way: Way, alike: Mapping[str, float]) -> str:
    if alike:
        return (
            f"shorten: no merge keeps the last states as similar as {way.similarity}; the best reaches "
            f"{max(alike.values()):.3f}. Give a lower similarity, or remove fewer layers."
        )
    return (
        "shorten: the loss is not finite whatever is taken out: the checkpoint holds inf or nan, or overflows. "
        "Fine-tune again with a lower learning rate, or fetch the checkpoint again."
    )


def _by_states(way: Way, remove: int, score: str, progress: Progress) -> Found:
    batches = progress.track(labelled_batches(way.model, way.sample), "scoring layers")
    if score == "angular":
        spans: list[Group] = _spans(way, remove)
        found = span_distances(way.model.network, batches, spans, angular_distance)
        names = [f"angle over {_several(way.of(span))}" for span in spans]
        gone = set(spans[found.index(min(found))])
    else:
        spans = [(index,) for index in sorted(way.eligible)]
        return _by_influence(way, remove, spans, span_distances(way.model.network, batches, spans, block_influence))
    return _without(way, gone, dict(zip(names, found, strict=True)))


def _by_influence(way: Way, remove: int, spans: Sequence[Group], influence: Sequence[float]) -> Found:
    names = [f"influence of {_one(way.blocks[span[0]])}" for span in spans]
    gone = _least_influential(way, spans, influence, remove)
    return _without(way, gone, dict(zip(names, influence, strict=True)))


def _without(way: Way, gone: set[int], scores: dict[str, float]) -> Found:
    groups: Groups = tuple((index,) for index in range(len(way.blocks)) if index not in gone)
    if way.how != "drop":
        groups = _merging(way, gone)
    return Found(way, groups, [scores])


def _spans(way: Way, remove: int) -> list[Group]:
    """All runs of `remove` neighbours that may go and leave their stack a block."""
    spans = []
    for start in range(len(way.blocks) - remove + 1):
        span = tuple(range(start, start + remove))
        stacks = {block.stack for block in way.of(span)}
        if way.eligible.issuperset(span) and len(stacks) == 1 and len(way.anatomy.stack(min(stacks))) > remove:
            spans.append(span)
    return spans


def _least_influential(way: Way, spans: Sequence[Group], influence: Sequence[float], remove: int) -> set[int]:
    """The blocks of lowest influence, one staying in each stack; ties go to the lower block."""
    gone: set[int] = set()
    left = {name: len(way.anatomy.stack(name)) for name in ("encoder", "decoder")}
    if way.how != "drop" and way.anatomy.family.first_stays:
        left = {name: count - 1 for name, count in left.items()}
    for _, (index,) in sorted(zip(influence, spans, strict=True)):
        name = way.blocks[index].stack
        if len(gone) < remove and left[name] > 1:
            gone.add(index)
            left[name] -= 1
    return gone


def _merging(way: Way, gone: set[int]) -> Groups:
    """The groups in which `gone` are merged into their neighbours."""
    groups = _absorb(way, gone)
    for group in groups:
        reason = way.hindrance(group)
        if reason:
            raise ModelError(f"shorten: {way.how} needs neighbours of equal shapes; {reason}. {_INSTEAD}")
    if way.similarity is not None:
        reached = way.alike(groups)
        if reached < way.similarity:
            raise ModelError(_none_left(way, {"": reached}))
    return groups
