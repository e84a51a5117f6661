"""Prune: set single weights to zero by magnitude, Wanda or SparseGPT. The driver; the solvers are pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Block, Matrix
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.damage import after_pruning
from moss_rlhf.model.replay import InputStatistics, calibrate, visit_blocks
from moss_rlhf.optimization.allocation import outlier_ratio, sparsities_by_outliers
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.fallbacks import DAMPING, Fallbacks
from moss_rlhf.optimization.magnitude import global_magnitude_masks
from moss_rlhf.optimization.patterns import pattern_mask
from moss_rlhf.optimization.sensitivity import current_table, sparsities_by_damage
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.optimization.sparsegpt import prune_by_sparsegpt
from moss_rlhf.optimization.wanda import wanda_score
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import PruneSpec, pruning_fault
from moss_rlhf.recipe.options import follows
from moss_rlhf.recipe.pattern import Pattern, misfit, parse_pattern
from moss_rlhf.tasks.loading import encoded

Method = Literal["magnitude", "wanda", "sparsegpt"]
Allocation = Literal["uniform", "outliers", "sensitivity"]
Scope = Literal["layer", "global"]

_VERDICT = {
    "unstructured": "no: unstructured zeros keep every shape, and no runtime here leaves them out",
    "n:m": "no: n:m zeros are left out by some GPUs' sparse kernels only; on a processor they are multiplied",
    "block": "no: no runtime here leaves out blocks of zeros",
}


@takes_model
@follows(PruneSpec, "prune")
def prune(
    model: Model,
    train: Any = None,
    *,
    sparsity: float | None = None,
    method: Method = "magnitude",
    pattern: str = "unstructured",
    scope: Scope = "layer",
    allocation: Allocation = "uniform",
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Zero weights of the blocks' matrices, in place; returns the facts. The zeros stay zero in later fine-tuning.

    train        rows; `rows` of them, drawn by `seed`, are what Wanda, SparseGPT and the allocations measure on.
    sparsity     share of every matrix, in (0, 1); None where the pattern n:m says it.
    method       magnitude (Han et al. 2015), wanda (Sun et al. 2023) or sparsegpt (Frantar & Alistarh 2023), which also
                 changes the weights that stay. Blocks are measured in order, each on the outputs of the pruned ones.
    pattern      unstructured, n:m such as 2:4, or a block such as 4x1.
    scope        magnitude only: one threshold a matrix ("layer"), or one for all ("global").
    allocation   uniform: the same share everywhere; outliers: blocks with more outlying activations keep more (Yin et
                 al. 2023); sensitivity: shares that cost the least loss together, from `model.sensitivity`, which is
                 measured first where it is missing or of another network.
    raises       RecipeError on an option that a recipe could not hold;
                 ModelError on a quantized model, inf or nan, options that don't go together, a pattern that doesn't fit
                 a matrix, or a sparsity that removes nothing; DataError where rows are needed and there are none.
    """
    shape, share = _options(model, method, pattern, sparsity, scope, allocation)
    _refuse_misfits(model, shape, share)
    progress = progress or Progress(quiet=True)
    needs_rows = method != "magnitude" or allocation != "uniform"
    if needs_rows and train is None:
        raise ModelError(f"prune: method {method} with allocation {allocation} measures on rows; give training rows.")
    sample = _sample(model, train, rows, seed, allocation) if needs_rows else None
    shares, source = _shares(model, train, sample, share, allocation, rows, seed, progress)
    fallbacks = Fallbacks()
    if method == "magnitude":
        _prune_by_magnitude(model, shape, share, shares, scope)
    else:
        _prune_by_inputs(model, list(labelled_batches(model, sample)), method, shape, shares, fallbacks, progress)
    by_block = {block.name: _mean_share(block, shares) for block in model.anatomy.blocks}
    model.sensitivity = after_pruning(model.sensitivity, by_block)
    facts = _facts(model, shape, method, len(sample) if sample is not None else 0)
    return facts | fallbacks.facts() | ({"shares": by_block} if allocation != "uniform" else {}) | source


def _sample(model: Model, train: Any, rows: int, seed: int, allocation: str) -> Any:
    """Only sensitivity holds answers against labels."""
    return calibration_rows(encoded(model, train, judged=allocation == "sensitivity"), rows, seed)


def _options(
    model: Model, method: str, pattern: str, sparsity: float | None, scope: str, allocation: str
) -> tuple[Pattern, float]:
    """The pattern and the share, or ModelError."""
    if model.quantization:
        raise ModelError("prune: the model is quantized already; prune it before, then quantize.")
    try:
        shape = parse_pattern(pattern)
    except ValueError as error:
        raise ModelError(f"prune: {error}.") from None
    share = shape.sparsity if sparsity is None else sparsity
    if share is None:
        raise ModelError("prune: give sparsity, such as 0.5, or a pattern n:m, which says it by itself.")
    if shape.keep and abs(share - (shape.sparsity or 0)) > 1e-9:
        raise ModelError(
            f"prune: pattern {pattern} means sparsity {shape.sparsity}, got {sparsity}. Leave sparsity out."
        )
    if fault := pruning_fault(method, pattern, sparsity, scope, allocation):
        raise ModelError(f"prune: {fault}")
    return shape, share


def _refuse_misfits(model: Model, pattern: Pattern, share: float) -> None:
    """ModelError where a matrix can't take the pattern, has nothing to remove, or holds inf or nan."""
    refuse_not_finite(model, "prune")
    for matrix in model.anatomy.matrices:
        out, width = matrix.weight.shape
        if fault := misfit(out, width, pattern, share):
            raise ModelError(f"prune: {matrix.name} {fault}")


def _shares(
    model: Model,
    train: Any,
    sample: Any,
    share: float,
    allocation: Allocation,
    rows: int,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, float], dict[str, object]]:
    """The share that goes of every matrix, by name, and where a table of sensitivity came from."""
    matrices = model.anatomy.matrices
    if allocation == "uniform":
        return dict.fromkeys((matrix.name for matrix in matrices), share), {}
    if allocation == "outliers":
        return _shares_by_outliers(model, sample, share, progress), {}
    table, source = current_table(model, train, rows=rows, seed=seed, progress=progress)
    curves = [table["matrices"][matrix.name]["prune"] for matrix in matrices]
    try:
        found = sparsities_by_damage(curves, [matrix.weight.numel() for matrix in matrices], share)
    except ValueError as error:
        raise ModelError(f"prune: {error}.") from None
    return {matrix.name: one for matrix, one in zip(matrices, found, strict=True)}, source


def _shares_by_outliers(model: Model, sample: Any, share: float, progress: Progress) -> dict[str, float]:
    """One pass over the uncut model: a share a block, the same for all of its matrices."""
    ratios, counts, names = [], [], []
    batches = list(labelled_batches(model, sample))
    for visit in calibrate(model, batches, gather="norms", progress=progress, title="counting outliers"):
        found = [outlier_ratio(matrix.weight, visit.statistics[matrix.name].norm) for matrix in visit.block.matrices]
        sizes = [matrix.weight.numel() for matrix in visit.block.matrices]
        ratios.append(sum(ratio * size for ratio, size in zip(found, sizes, strict=True)) / sum(sizes))
        counts.append(sum(sizes))
        names.append([matrix.name for matrix in visit.block.matrices])
    try:
        shares = sparsities_by_outliers(ratios, share, weights=counts)
    except ValueError as error:
        raise ModelError(f"prune: allocation outliers: {error}. Give a sparsity nearer to 0.5.") from None
    return {name: one for block, one in zip(names, shares, strict=True) for name in block}


@torch.no_grad()
def _prune_by_magnitude(model: Model, pattern: Pattern, share: float, shares: Mapping[str, float], scope: str) -> None:
    chosen = _global_masks(model, share) if scope == "global" else {}
    for block in visit_blocks(model):
        for matrix in block.matrices:
            mask = chosen.get(matrix.name)
            if mask is None:
                mask = pattern_mask(matrix.weight.abs(), pattern, shares[matrix.name], by_row=False)
            _zero(model, matrix, matrix.weight.masked_fill(mask, 0))


def _global_masks(model: Model, share: float) -> dict[str, Tensor]:
    matrices = model.anatomy.matrices
    masks = global_magnitude_masks([matrix.weight for matrix in matrices], share)
    if any(mask.all() for mask in masks):
        raise ModelError(
            f"prune: a global threshold for sparsity {share} would empty a whole matrix. Give a smaller share, or "
            "scope layer."
        )
    return {matrix.name: mask for matrix, mask in zip(matrices, masks, strict=True)}


def _prune_by_inputs(
    model: Model,
    batches: Any,
    method: str,
    pattern: Pattern,
    shares: Mapping[str, float],
    fallbacks: Fallbacks,
    progress: Progress,
) -> None:
    """Block by block, each by what leaves the pruned ones below."""
    gather: Literal["norms", "grams"] = "grams" if method == "sparsegpt" else "norms"
    for visit in calibrate(model, batches, gather=gather, progress=progress, title=f"pruning ({method})"):
        for matrix in visit.block.matrices:
            # taken out: no name of ours is to hold the last one's gram while the next block runs
            _solve(model, matrix, visit.statistics.pop(matrix.name), method, pattern, shares[matrix.name], fallbacks)


_SWEEPS = 3  # ten gain a sixth more and take three times as long


def _solve(
    model: Model,
    matrix: Matrix,
    found: InputStatistics,
    method: str,
    pattern: Pattern,
    share: float,
    fallbacks: Fallbacks,
) -> None:
    try:
        if method == "sparsegpt" and found.gram is not None:
            sparse = prune_by_sparsegpt(
                matrix.weight, found.gram, share, pattern=pattern, damping=DAMPING, sweeps=_SWEEPS
            )
            fallbacks.note(matrix.name, damping=sparse.damping, tokens=found.tokens, width=matrix.in_features)
            weight = sparse.weight
        else:
            mask = pattern_mask(wanda_score(matrix.weight, found.norm), pattern, share, by_row=True)
            weight = matrix.weight.masked_fill(mask, 0)
    except ValueError as error:
        raise ModelError(f"prune: {matrix.name}: {error}.") from None
    _zero(model, matrix, weight)


def _zero(model: Model, matrix: Matrix, weight: Tensor) -> None:
    matrix.weight.copy_(weight)
    zeros = torch.count_nonzero(weight) < weight.numel()  # none where an allocation spares the whole matrix
    if zeros and not any(parameter is matrix.parameter for parameter in model.pruned):
        model.pruned.append(matrix.parameter)


def _mean_share(block: Block, shares: Mapping[str, float]) -> float:
    sizes = {matrix.name: matrix.weight.numel() for matrix in block.matrices}
    return sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())


def _facts(model: Model, pattern: Pattern, method: str, rows: int) -> dict[str, object]:
    matrices = model.anatomy.matrices
    total = sum(matrix.weight.numel() for matrix in matrices)
    zeros = total - sum(int(torch.count_nonzero(matrix.weight)) for matrix in matrices)
    kind = "n:m" if pattern.keep else "block" if pattern.block else "unstructured"
    facts: dict[str, object] = {
        "removed": f"{zeros:,} of the blocks' {total:,} weights are zero; the file keeps its size",
        "measured": f"the inputs of every matrix on {rows} rows" if rows else "nothing: the weights alone decided",
        "method": method,
        "zeroed": zeros,
        "of": total,
        "sparsity": zeros / total,
    }
    if rows:
        facts["rows_measured"] = rows
    return facts | {"faster_here": _VERDICT[kind]}
