"""Narrow the blocks: remove whole attention heads, feed-forward neurons and hidden features, so that matrices shrink.

Units are scored (`unit_scores`), widths and units chosen (`width_allocation`): a share of every block, or wherever it
costs least under a budget of multiply-accumulates, weights or measured time. What stays is refitted to the uncut
network's outputs by least squares (`repair`), no training. In several steps, each scored anew on the repaired network.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import BlockShape
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.cost import block_macs, units_kept
from moss_rlhf.model.damage import Kept, after_narrowing
from moss_rlhf.model.latency import Measure
from moss_rlhf.model.limits import nothing_removed
from moss_rlhf.model.replay import Batch
from moss_rlhf.model.surgery import keep_hidden
from moss_rlhf.optimization.calibration import calibration_rows, compare_speed, labelled_batches
from moss_rlhf.optimization.repair import repair_outputs
from moss_rlhf.optimization.sensitivity import current_table
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.optimization.unit_scores import (
    KINDS,
    Kind,
    Part,
    Score,
    activation_scores,
    block_parts,
    groups_of,
    hidden_scores,
    parts_of,
    unit_scores,
)
from moss_rlhf.optimization.width_allocation import keep_highest, rearrange
from moss_rlhf.optimization.width_plan import Plan, budgeted_plan, uniform_plan
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import BUDGETS, NarrowSpec, narrowing_fault
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks.loading import encoded

Criterion = Score | Literal["sensitivity"]
_COPIED_BYTES = 2**30  # a network up to this size is copied to be timed beside the narrowed one


@takes_model
@follows(NarrowSpec, "narrow")
def narrow(
    model: Model,
    train: Any,
    *,
    heads: float = 0.0,
    feed_forward: float = 0.0,
    hidden: float = 0.0,
    macs: float = 0.0,
    parameters: float = 0.0,
    latency: float = 0.0,
    score: Criterion = "fisher",
    steps: int = 1,
    repair: bool = True,
    rows: int = 1024,
    multiple_of: int = 8,
    measure: Measure | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Remove heads, neurons and hidden features in place; returns the facts. All shares are shares removed, in [0, 1).

    train                       rows with labels; `rows` of them, drawn by `seed`, are scored on and repaired with.
    heads, feed_forward         of every attention's heads, of every feed-forward's neurons.
    macs, parameters, latency   instead, one of them: of the blocks' multiply-accumulates, of their matrices' weights,
                                of their matrix products' measured time; heads and neurons go where they cost least.
    hidden                      of the hidden size, after everything else; it needs fine-tuning afterwards.
    score                       see `unit_scores`; sensitivity: the Fisher information in `model.sensitivity` of this
                                very network, else measured first. Saved scores know no single text, so units are
                                not chosen together (mask rearrangement); steps after the first measure Fisher anew.
    steps                       cuts on the way; scores are measured anew before each, repairs done after each.
    repair                      refit what stays to the uncut outputs.
    multiple_of                 feed-forward and hidden widths are rounded up to it: runtimes like multiples of 8 or 16.
    measure                     for `latency`: seconds of a part of a block at a width; PyTorch's unless given.
    raises                      the model untouched: RecipeError on an option that a recipe could not hold, such as a
                                share outside [0, 1); ModelError on a quantized or streamed model, weights or scores
                                that are not finite, shares and a budget together, what would remove nothing, and a
                                budget that even the smallest widths exceed; DataError where there are no rows.
    """
    shares = {"heads": heads, "feed_forward": feed_forward, "hidden": hidden}
    budgets: dict[str, float] = {"macs": macs, "parameters": parameters, "latency": latency}
    if fault := narrowing_fault(shares | budgets):
        raise ModelError(f"narrow: {fault}.")
    _refuse_model(model)
    progress = progress or Progress(quiet=True)
    sample = calibration_rows(encoded(model, train, judged=True), rows, seed)
    length, size = float(np.mean(sample["length"])), model.anatomy.hidden_size
    of = next((name for name in BUDGETS if budgets[name]), None)
    plan: Plan = (
        uniform_plan(model, heads, feed_forward, multiple_of)
        if of is None
        else budgeted_plan(model, of, budgets[of], multiple_of=multiple_of, length=length, measure=measure)
    )
    features = units_kept(size, hidden, multiple_of) if hidden else size
    if not plan.narrows and features == size:
        raise ModelError(f"narrow: {nothing_removed(shares, model.anatomy.shapes[0], size)}")
    if features < size:
        keep_hidden(copy.deepcopy(model.network), torch.arange(features))  # raises, if it does, before any work
    before, batches = _State.of(model, length), list(labelled_batches(model, sample))
    record, source = _Record(), dict[str, object]()
    if score == "sensitivity":
        record.table, source = current_table(model, train, rows=rows, seed=seed, progress=progress)
    uncut = copy.deepcopy(model.network) if repair or _bytes(model) <= _COPIED_BYTES else None
    if plan.narrows:
        _narrow_units(
            model, plan, batches, record, uncut=uncut, steps=steps, score=score, repair=repair, progress=progress
        )
    if features < size:
        keep_hidden(model.network, keep_highest(hidden_scores(model, batches, progress), features))
    model.pruned = [parameter for parameter in model.pruned if torch.count_nonzero(parameter) < parameter.numel()]
    facts = _facts(before, _State.of(model, length), record, rows=len(sample), budget_of_time=of == "latency")
    if plan.narrows:
        facts |= _spend(model, record, score, texts=len(sample))
    return facts | source | {"measured": _speed(uncut, model.network, batches)}


def _bytes(model: Model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.network.parameters())


def _speed(uncut: Any, network: Any, batches: Sequence[Batch]) -> str:
    if uncut is None:
        return "not timed: a copy of the uncut network would not fit beside it; predicted from its operations"
    uncut.eval()
    network.eval()
    return compare_speed(uncut, network, batches)


def _spend(model: Model, record: _Record, score: str, texts: int) -> dict[str, object]:
    """Cut the table of sensitivity to the units that stay; the loss that went, where the scores are in its units."""
    in_units_of_loss = {"sensitivity": 1.0, "fisher": 0.5 / texts}.get(score)
    kept = {
        block.name: Kept(
            {part.kind: record.units[part.name] for part in block_parts(block) if part.name in record.units},
            sum(record.lost.get(part.name, 0.0) for part in block_parts(block)) * (in_units_of_loss or 0.0),
        )
        for block in model.anatomy.blocks
    }
    if in_units_of_loss is None and not model.sensitivity:
        return {}
    model.sensitivity = after_narrowing(model.sensitivity, kept)
    return {"damage": model.sensitivity["damage"]} if in_units_of_loss is not None else {}


# --- what is done --------------------------------------------------------------------------------------------------


@dataclass
class _Record:
    """What happened over all steps, by the parts' names.

    kept     share of the score that stayed; lost: the score that went, in the score's own units.
    units    which of the old units stayed.
    errors   of the last repair.
    table    of sensitivity, where the first step reads its scores from it.
    """

    kept: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    units: dict[str, list[int]] = field(default_factory=dict)
    table: Mapping[str, Any] | None = None
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def _narrow_units(
    model: Model,
    plan: Plan,
    batches: Sequence[Batch],
    record: _Record,
    *,
    uncut: Any,
    steps: int,
    score: Criterion,
    repair: bool,
    progress: Progress,
) -> None:
    """Score the units as the network is, cut a part of the way, repair; and again."""
    if repair and score == "magnitude":
        activation_scores(model, batches, progress)  # the only score that would not see activations that overflow
    for step in range(1, steps + 1):
        scores, gradients = _scores(model, batches, score, record if step == 1 else None, progress)
        groups = groups_of(model.anatomy)
        together = {group[0].name: _together(group, scores, score) for group in groups}
        for group, width in zip(groups, plan.widths(groups, together, step / steps), strict=True):
            if width < group[0].units:
                kept = keep_highest(together[group[0].name], width)
                if score == "fisher":  # what the table holds are sums over texts
                    kept = rearrange(torch.cat([gradients[part.name] for part in group]), kept)
                _cut(group, kept, scores, record)
        if repair:
            frozen = {id(parameter) for parameter in model.pruned}
            record.errors = repair_outputs(model.network, uncut, batches, frozen=frozen, progress=progress)


def _scores(
    model: Model, batches: Sequence[Batch], score: Criterion, record: _Record | None, progress: Progress
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """As `unit_scores`; of the table of sensitivity where the record holds one."""
    if score != "sensitivity":
        return unit_scores(model, batches, score, progress)
    if record is not None and record.table is not None:
        blocks = record.table["blocks"]
        parts = parts_of(model.anatomy)
        return {part.name: torch.tensor(blocks[part.block.name][part.kind], dtype=torch.float64) for part in parts}, {}
    scores, _ = unit_scores(model, batches, "fisher", progress)
    texts = sum(len(labels) for _, labels in batches)
    return {name: 0.5 * found / texts for name, found in scores.items()}, {}


def _cut(group: Sequence[Part], kept: Tensor, scores: Mapping[str, Tensor], record: _Record) -> None:
    for part in group:
        score, before = scores[part.name], record.units.get(part.name, list(range(part.units)))
        record.kept[part.name] = record.kept.get(part.name, 1.0) * _share(score, kept)
        record.lost[part.name] = record.lost.get(part.name, 0.0) + float(score.sum() - score[kept].sum())
        record.units[part.name] = [before[index] for index in kept.tolist()]
        part.keep(kept)


def _together(group: Sequence[Part], scores: Mapping[str, Tensor], score: Criterion) -> Tensor:
    """One score a unit of a group: the sum. What is not in units of the loss counts as a share of its part's."""
    parts = [scores[part.name] for part in group]
    if score in ("activation", "magnitude"):
        parts = [part / part.sum().clamp(min=torch.finfo(part.dtype).tiny) for part in parts]
    return torch.stack(parts).sum(dim=0)


def _share(score: Tensor, kept: Tensor) -> float:
    return float(score[kept].sum() / score.sum()) if score.sum() > 0 else 1.0


# --- what is told --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """The network's sizes: of its blocks by their names, of its hidden state, its blocks' operations for one token."""

    shapes: Mapping[str, BlockShape]
    hidden: int
    macs: float

    @classmethod
    def of(cls, model: Model, length: float) -> _State:
        dimensions = model.dimensions
        macs = sum(block_macs(shape, dimensions, length) for shape in dimensions.blocks)
        return cls({block.name: block.shape for block in model.anatomy.blocks}, dimensions.hidden, macs)


def _facts(before: _State, after: _State, record: _Record, *, rows: int, budget_of_time: bool) -> dict[str, object]:
    old, new = tuple(before.shapes.values()), tuple(after.shapes.values())
    kinds: list[Kind] = [kind for kind in KINDS if any(getattr(shape, kind) for shape in old)]
    sizes: dict[str, object] = {kind: f"{_span(old, kind)} → {_span(new, kind)} a block" for kind in kinds}
    gone = 1 - after.macs / before.macs
    facts: dict[str, object] = {"removed": f"{gone:.0%} of the blocks' multiply-accumulates"} | sizes
    if before.hidden != after.hidden:
        facts["hidden"] = f"{before.hidden} → {after.hidden}; fine-tune before use"
    facts["blocks"] = {
        name: {kind: [getattr(before.shapes[name], kind), getattr(after.shapes[name], kind)] for kind in kinds}
        for name in before.shapes
    }
    facts["rows_scored"] = rows
    facts["score_lost"] = [
        {kind: 1 - record.kept.get(f"{name}.{kind}", 1.0) for kind in kinds if getattr(shape, kind)}
        for name, shape in before.shapes.items()
    ]
    facts["macs_per_token"] = [before.macs, after.macs]
    if record.errors:
        facts["repair_error"] = {name: list(errors) for name, errors in record.errors.items()}
    facts["faster_here"] = _faster(gone, budget_of_time)
    return facts


def _span(shapes: Sequence[BlockShape], kind: Kind) -> str:
    """'12', or '5 to 12' where blocks differ."""
    sizes = [getattr(shape, kind) for shape in shapes if getattr(shape, kind)]
    return f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"


def _faster(gone: float, budget_of_time: bool) -> str:
    how = "; the time budget counts matrix products alone" if budget_of_time else ""
    return f"yes: the blocks' matrices are physically smaller, with {gone:.0%} fewer multiply-accumulates{how}"


# --- what is refused -----------------------------------------------------------------------------------------------


def _refuse_model(model: Model) -> None:
    if model.quantization:
        raise ModelError("narrow: the model is quantized already; narrow it before, then quantize.")
    if model.weights is not None:
        raise ModelError("narrow: the model's blocks are on disk (offload); load it whole to narrow it.")
    refuse_not_finite(model, "narrow")
