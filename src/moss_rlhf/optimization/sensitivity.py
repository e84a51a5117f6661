"""Sensitivity: what each block and matrix would lose, by every method, in units of the task's loss.

Two passes over calibration rows, one backward and one forward. To second order, with the curvature of one matrix's
weights taken as the Kronecker product of its inputs' and its output gradients' second moments (Martens & Grosse 2015,
arXiv:1503.05671, §3; of the gradients only the diagonal), changing W by D changes the mean loss of a row by

    ½ · Σ_o g_o · (D A Dᵀ)_oo        A = Σ x xᵀ / tokens,  g_o = Σ_{rows, tokens} (∂loss / ∂y_o)² / rows

so that pruning to any sparsity and rounding to any bits are scored from A and g alone, and one block's damage can be
added to and compared with another's. Units that could be narrowed are scored by Fisher information (½ Σ_rows
(∂loss/∂mask)² / rows, the same expansion), blocks that could be dropped by their influence 1 − cos(input, output)
(Men et al. 2024, arXiv:2403.03853, eq. 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Block, Matrix
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.fingerprint import network_digest
from moss_rlhf.model.grid import integer_grid, round_to_grid
from moss_rlhf.model.replay import Batch, InputStatistics, Replay
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.optimization.wanda import wanda_mask
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import SPARSITIES, SensitivitySpec
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

BITS = (8, 6, 5, 4, 3, 2)


def loss_damage(change: Tensor, gram: Tensor, tokens: int, gradient: Tensor) -> float:
    """½ Σ_o g_o (D A Dᵀ)_oo: what the mean loss of a row would rise by, to second order.

    change     (out, in), new weight − old.
    gram       (in, in), Σ x xᵀ over `tokens` tokens.
    gradient   (out,), Σ (∂loss / ∂y)² over rows and tokens, divided by rows.
    """
    moved = ((change @ gram) * change).sum(dim=1, dtype=torch.float64) / max(tokens, 1)
    return 0.5 * float((moved * gradient.to(moved)).sum())


def matrix_damage(weight: Tensor, statistics: InputStatistics, gradient: Tensor) -> dict[str, dict[str, float]]:
    """Damage of one matrix for every sparsity (Wanda's mask) and every number of bits (rounded to nearest)."""
    if statistics.gram is None:
        raise ValueError("the statistics hold no gram matrix; gather grams")
    weight = weight.float()

    def damage(changed: Tensor) -> float:
        return loss_damage(changed - weight, statistics.gram, statistics.tokens, gradient)  # type: ignore[arg-type]

    masks = {sparsity: wanda_mask(weight, statistics.norm, sparsity) for sparsity in SPARSITIES}
    return {
        "prune": {str(sparsity): damage(weight.masked_fill(mask, 0)) for sparsity, mask in masks.items()},
        "bits": {str(bits): damage(round_to_grid(weight, integer_grid(bits))) for bits in BITS},
    }


@takes_model
@follows(SensitivitySpec, "sensitivity")
def sensitivity(
    model: Model, train: Any, *, rows: int = 256, seed: int = 0, progress: Progress | None = None
) -> dict[str, object]:
    """Score every block and matrix; keeps the result as `model.sensitivity`, which is saved with the checkpoint.

    train    rows with labels; `rows` of them, drawn by `seed`, are measured on.
    returns  facts: the blocks from the most to the least sensitive, and the whole table: {"matrices": {name: {"prune",
             "bits"}}, "blocks": {name: {"drop", "prune", "bits", "heads", "feed_forward"}}}.
    raises   ModelError on a quantized model, inf or nan; DataError on no rows. The network is not changed.
    """
    if model.quantization:
        raise ModelError("sensitivity: the model is quantized already; measure it before.")
    refuse_not_finite(model, "sensitivity")
    progress = progress or Progress(quiet=True)
    sample = calibration_rows(encoded(model, train, judged=True), rows, seed)
    measured, batches = len(sample), list(labelled_batches(model, sample))
    gradients, units = _gradients(model, batches, progress)
    matrices, drops = _forward_scores(model, batches, gradients, progress)
    blocks = _by_block(model, matrices, drops, units)
    of = {"network": network_digest(model.network), "rows": measured, "seed": seed}
    spent = (model.sensitivity or {}).get("damage")
    table = of | {"matrices": matrices, "blocks": blocks} | ({"damage": spent} if spent else {})
    model.sensitivity = table
    ranked = sorted(blocks, key=lambda name: -float(blocks[name]["prune"]["0.5"]))
    return {
        "removed": "nothing",
        "measured": f"{len(matrices)} matrices and {len(blocks)} blocks on {measured} rows, forward and backward",
        "most_sensitive_first": ranked,
        "table": table,
        "faster_here": "no: nothing was changed; later stages read the table instead of measuring again",
    }


def current_table(
    model: Model, train: Any, *, rows: int, seed: int, progress: Progress
) -> tuple[dict[str, Any], dict[str, object]]:
    """(the table of this very network, what to say of it): the saved one, or measured now where there is no such.

    raises   as `sensitivity`.
    """
    table, kept = model.sensitivity or {}, "matrices" in (model.sensitivity or {})
    if kept and table.get("network") == network_digest(model.network):
        return table, {"sensitivity": f"read from the saved table, measured on {table['rows']} rows; no new pass"}
    reason = "the saved table is of the network before it was changed" if table else "no table was saved"
    sensitivity(model, train, rows=rows, seed=seed, progress=progress)
    found = model.sensitivity or {}
    return found, {"sensitivity": f"measured on {found['rows']} rows first: {reason}"}


def _gradients(
    model: Model, batches: Sequence[Batch], progress: Progress
) -> tuple[dict[str, Tensor], dict[str, dict[str, list[float]]]]:
    """One backward pass: g of every matrix, and the Fisher information of every unit."""
    task, blocks = TASKS[model.task], model.anatomy.blocks
    rows = sum(len(labels) for _, labels in batches)
    squares = {matrix.name: torch.zeros(matrix.out_features, dtype=torch.float64) for matrix in model.anatomy.matrices}
    fisher = {block.name: _empty_units(block) for block in blocks}
    model.network.eval()
    for inputs, labels in progress.track(batches, "scoring by gradients"):
        with _watching(blocks) as (outputs, entering), torch.enable_grad():
            loss = task.loss(model.network(**inputs).logits, labels, reduction="sum")
            watched = [value for _, value in (*outputs, *entering)]
            found = torch.autograd.grad(loss, watched, allow_unused=True)
        for (matrix, _), gradient in zip(outputs, found[: len(outputs)], strict=True):
            if gradient is not None:
                squares[matrix.name] += gradient.double().square().flatten(0, -2).sum(dim=0).cpu() / rows
        for ((block, part), value), gradient in zip(entering, found[len(outputs) :], strict=True):
            fisher[block.name][part] += _unit_fisher(block, part, value, gradient, len(labels)) / rows
    return squares, {name: {part: score.tolist() for part, score in parts.items()} for name, parts in fisher.items()}


def _empty_units(block: Block) -> dict[str, Tensor]:
    sizes = {"heads": block.attention.units, "feed_forward": block.feed_forward.width}
    sizes |= {"cross_heads": block.cross_attention.units} if block.cross_attention else {}
    return {part: torch.zeros(size, dtype=torch.float64) for part, size in sizes.items()}


def _unit_matrices(block: Block) -> dict[str, tuple[Matrix, int]]:
    """{part: (the matrix that reads the units, input features a unit owns)}."""
    parts = {
        "heads": (block.attention.output, block.attention.unit_features),
        "feed_forward": (block.feed_forward.down, 1),
    }
    if block.cross_attention:
        parts["cross_heads"] = (block.cross_attention.output, block.cross_attention.unit_features)
    return parts


def _unit_fisher(block: Block, part: str, value: Tensor, gradient: Tensor, rows: int) -> Tensor:
    """½ Σ_rows (Σ_{tokens, features of the unit} x · ∂loss/∂x)²: the gradient of the unit's mask, squared."""
    features = _unit_matrices(block)[part][1]
    products = (value * gradient).double().reshape(rows, -1, value.shape[-1]).sum(dim=1)
    scores: Tensor = 0.5 * products.reshape(rows, -1, features).sum(dim=2).square().sum(dim=0).cpu()
    return scores


Watched = tuple[list[tuple[Matrix, Tensor]], list[tuple[tuple[Block, str], Tensor]]]


@contextmanager
def _watching(blocks: Sequence[Block]) -> Iterator[Watched]:
    """Collect what every matrix gives out, and what enters those that read units, while the network runs."""
    outputs: list[tuple[Matrix, Tensor]] = []
    entering: list[tuple[tuple[Block, str], Tensor]] = []
    handles = []
    for block in blocks:
        for matrix in block.matrices:
            handles.append(
                matrix.module.register_forward_hook(lambda _, __, out, matrix=matrix: outputs.append((matrix, out)))
            )
        for part, (matrix, _) in _unit_matrices(block).items():
            handles.append(
                matrix.module.register_forward_pre_hook(
                    lambda _, args, block=block, part=part: entering.append(((block, part), args[0]))
                )
            )
    try:
        yield outputs, entering
    finally:
        for handle in handles:
            handle.remove()


def _forward_scores(
    model: Model, batches: Sequence[Batch], gradients: Mapping[str, Tensor], progress: Progress
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, float]]:
    """One pass block by block: damage of every matrix, and 1 − cos(input, output) of every block."""
    matrices: dict[str, dict[str, dict[str, float]]] = {}
    drops: dict[str, float] = {}
    replay = Replay(model.network, batches, weights=model.weights)
    with replay, progress.bar("scoring by inputs", len(replay.blocks)) as bar:
        for position, block in enumerate(replay.blocks):
            with replay.loaded(block):
                statistics = replay.gather(position, "grams")
                if position == replay.last_use(block):
                    for matrix in block.matrices:
                        found = statistics[matrix.name]
                        matrices[matrix.name] = matrix_damage(matrix.weight, found, gradients[matrix.name])
                drops[block.name] = replay.influence(position)
                replay.advance(position)
            bar.advance()
    return matrices, drops


def _by_block(
    model: Model,
    matrices: Mapping[str, Mapping[str, Mapping[str, float]]],
    drops: Mapping[str, float],
    units: Mapping[str, Mapping[str, list[float]]],
) -> dict[str, dict[str, Any]]:
    """The blocks' own table: sums over their matrices, and the scores of their units."""

    def total(block: Block, method: str) -> dict[str, float]:
        parts = [matrices[matrix.name][method] for matrix in block.matrices]
        return {level: sum(part[level] for part in parts) for level in parts[0]}

    return {
        block.name: {"drop": drops[block.name], "prune": total(block, "prune"), "bits": total(block, "bits")}
        | dict(units[block.name])
        for block in model.anatomy.blocks
    }


def sparsities_by_damage(curves: Sequence[Mapping[str, float]], weights: Sequence[int], sparsity: float) -> list[float]:
    """Sparsities of matrices whose weighted mean is `sparsity` and whose damage together is least.

    Greedy on the convex hull of each damage curve: the step that costs least a weight removed is taken first.
    curves    one a matrix: {sparsity as text: damage}, ascending.
    weights   how many weights each has.
    returns   one a matrix, in 0 … the curves' highest; the last step is taken in part to meet the mean exactly.
    raises    ValueError where `sparsity` is above the curves' highest.
    """
    target = sparsity * sum(weights)
    steps = sorted(step for index, curve in enumerate(curves) for step in _hull_steps(index, curve, weights[index]))
    found, removed = [0.0] * len(curves), 0.0
    for _, index, low, high in steps:
        share = min(1.0, max(0.0, (target - removed) / ((high - low) * weights[index])))
        if share > 0:
            found[index] = low + share * (high - low)
            removed += share * (high - low) * weights[index]
    if removed < target * (1 - 1e-9):
        raise ValueError(f"sparsity {sparsity} is more than the curves reach; give at most {SPARSITIES[-1]}")
    return found


def _hull_steps(index: int, curve: Mapping[str, float], weights: int) -> list[tuple[float, int, float, float]]:
    """(damage a weight, index, from, to) along the lower convex hull of one curve, which starts at (0, 0)."""
    hull = [(0.0, 0.0)]
    for point in sorted((float(level), damage) for level, damage in curve.items()):
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return [(_slope(low, high) / weights, index, low[0], high[0]) for low, high in pairwise(hull)]


def _slope(low: tuple[float, float], high: tuple[float, float]) -> float:
    return (high[1] - low[1]) / (high[0] - low[0])
