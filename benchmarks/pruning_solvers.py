"""Wanda and SparseGPT against plain transcriptions of the published pseudo-code, on random layers: time and error.

`python benchmarks/pruning_solvers.py`. Three seeds a shape; in each the two take turns on the same layer, so a noisy
machine slows both. Inputs are correlated, and their energy falls off as (1 + i)^-1/2. An output error is
‖(W − Ŵ)X‖² as a multiple of the transcription's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import keep, table
from torch import Tensor

from moss_rlhf.model.grid import INT8, Grid, grid_parameters, integer_grid, round_to_grid
from moss_rlhf.model.runtime import usable_cores
from moss_rlhf.optimization.gptq import output_error, round_by_gptq
from moss_rlhf.optimization.magnitude import magnitude_mask
from moss_rlhf.optimization.patterns import Pattern, all_but_highest
from moss_rlhf.optimization.sparsegpt import prune_by_sparsegpt, sparsegpt
from moss_rlhf.optimization.wanda import wanda_mask, wanda_mask_n_of_m

SHAPES = ((1024, 1024), (4096, 1024), (1024, 2048))
SEEDS = range(3)
SPARSITY = 0.5
KEEP = (2, 4)
SWEEPS = (1, 3, 10, 30)
GRIDS = {
    "4 bits, groups of 128, symmetric": integer_grid(4, 128),
    "4 bits, groups of 32, asymmetric": integer_grid(4, 32, symmetric=False),
    "3 bits, a scale a row, asymmetric": integer_grid(3, symmetric=False),
    "8 bits, a scale a row, symmetric": INT8,
}


def layer(out_features: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) * torch.arange(1, width + 1) ** -0.5
    inputs = torch.randn(2 * width, width, generator=generator) @ mix.T
    return torch.randn(out_features, width, generator=generator), inputs.T @ inputs


def transcribed_wanda(weight: Tensor, norm: Tensor, groups: tuple[int, int] | None = None) -> Tensor:
    """Algorithm 1 of arXiv:2306.11695: score, sort each row (or each group of n:m), mark the lowest."""
    score = weight.abs() * norm
    mask = torch.zeros_like(weight, dtype=torch.bool)
    if groups is None:
        lowest = score.sort(dim=1, stable=True).indices[:, : int(weight.shape[1] * SPARSITY)]
        return mask.scatter_(1, lowest, True)
    kept, of = groups
    for start in range(0, weight.shape[1], of):
        lowest = score[:, start : start + of].topk(of - kept, dim=1, largest=False).indices
        mask.scatter_(1, start + lowest, True)
    return mask


def transcribed_sparsegpt(
    weight: Tensor, hessian: Tensor, groups: tuple[int, int] | None = None, grid: Grid | None = None
) -> Tensor:
    """Algorithm 1 of arXiv:2301.00774, blocks and masks of 128 columns, dampened by 1 %, in float32.

    With a grid, §3.4: what stays is rounded when the walk reaches it, by the scales of the weights as they were.
    """
    rounded = (lambda values, column: values) if grid is None else column_rounding(weight, grid)
    weight, hessian = weight.clone(), hessian.clone()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for begin in range(0, weight.shape[1], 128):
        end = min(begin + 128, weight.shape[1])
        errors = torch.zeros(len(weight), end - begin)
        for column in range(begin, end):
            if column == begin and groups is None:
                cost = weight[:, begin:end] ** 2 / inverse.diagonal()[begin:end] ** 2
                ordered = cost.flatten().sort().values
                mask[:, begin:end] = cost < ordered[int(cost.numel() * SPARSITY)]
            if groups is not None and (column - begin) % groups[1] == 0:
                here = slice(column, column + groups[1])
                cost = weight[:, here] ** 2 / inverse.diagonal()[here] ** 2
                lowest = cost.topk(groups[1] - groups[0], dim=1, largest=False).indices
                mask[:, here] = torch.zeros_like(cost, dtype=torch.bool).scatter_(1, lowest, True)
            pruned = rounded(weight[:, column], column).masked_fill(mask[:, column], 0)
            errors[:, column - begin] = (weight[:, column] - pruned) / inverse[column, column]
            weight[:, column:end] -= errors[:, column - begin, None] @ inverse[None, column, column:end]
            weight[:, column] = pruned
        weight[:, end:] -= errors @ inverse[begin:end, end:]
    return weight


def column_rounding(weight: Tensor, grid: Grid) -> Callable[[Tensor, int], Tensor]:
    scale, zero = (
        one.repeat_interleave(grid.group_width(weight.shape[1]), dim=1) for one in grid_parameters(weight, grid)
    )

    def rounded(values: Tensor, column: int) -> Tensor:
        steps = (values / scale[:, column]).round() + zero[:, column]
        return (steps.clamp(grid.lowest, grid.highest) - zero[:, column]) * scale[:, column]

    return rounded


def stable_wanda(weight: Tensor, norm: Tensor, groups: tuple[int, int] | None) -> Tensor:
    """The mask with ties by position: topk, in the transcription of n:m, leaves open which of two equals it takes."""
    if groups is None:
        return transcribed_wanda(weight, norm)
    score = (weight.abs() * norm).reshape(-1, groups[1])
    lowest = score.argsort(dim=1, stable=True)[:, : groups[1] - groups[0]]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True).reshape(weight.shape)


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def speed(pairs: list[tuple[float, float]]) -> str:
    """The ratio of (theirs, ours), median (lowest to highest), and the medians in seconds."""
    ratios = [theirs / ours for theirs, ours in pairs]
    seconds = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return (
        f"{statistics.median(ratios):.1f}× ({min(ratios):.1f} to {max(ratios):.1f}); "
        f"{seconds[0]:.3f} s and {seconds[1]:.3f} s"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def wanda_rows(name: str, layers: list[tuple[Tensor, Tensor]], groups: tuple[int, int] | None) -> list[tuple]:
    pairs, same = [], True
    for weight, hessian in layers:
        norm = hessian.diagonal().sqrt()
        theirs = timed(lambda weight=weight, norm=norm: transcribed_wanda(weight, norm, groups))
        ours = timed(
            lambda weight=weight, norm=norm: (
                wanda_mask(weight, norm, SPARSITY) if groups is None else wanda_mask_n_of_m(weight, norm, *groups)
            )
        )
        pairs.append((theirs[0], ours[0]))
        same = same and torch.equal(stable_wanda(weight, norm, groups), ours[1])
    return [
        (f"{name}, Wanda: time of the transcription ÷ ours", speed(pairs), "≥ 1.5×"),
        (f"{name}, Wanda: the same mask, bit for bit", "yes" if same else "no", "yes"),
    ]


def sparsegpt_rows(name: str, layers: list[tuple[Tensor, Tensor]], groups: tuple[int, int] | None) -> list[tuple]:
    pairs, errors = [], []
    for weight, hessian in layers:
        pattern = Pattern(keep=groups)
        theirs = timed(lambda weight=weight, hessian=hessian: transcribed_sparsegpt(weight, hessian, groups))
        ours = timed(
            lambda weight=weight, hessian=hessian, pattern=pattern: (
                sparsegpt(weight, hessian, SPARSITY)
                if groups is None
                else prune_by_sparsegpt(weight, hessian, SPARSITY, pattern=pattern).weight
            )
        )
        norm = hessian.diagonal().sqrt()
        masks = (
            (magnitude_mask(weight, SPARSITY), wanda_mask(weight, norm, SPARSITY))
            if groups is None
            else (all_but_highest(weight.abs(), *groups), wanda_mask_n_of_m(weight, norm, *groups))
        )
        pairs.append((theirs[0], ours[0]))
        unit = output_error(weight - theirs[1], hessian)
        lost = (weight - ours[1], *(weight * mask for mask in masks))
        errors.append([output_error(change, hessian) / unit for change in lost])
    mine, magnitude, wanda = (list(column) for column in zip(*errors, strict=True))
    return [
        (f"{name}, SparseGPT: time of the transcription ÷ ours", speed(pairs), "≥ 1.5×"),
        (f"{name}, SparseGPT: output error ÷ the transcription's", spread(mine), "≤ 1.01"),
        (f"{name}, Wanda: the same", spread(wanda), "above SparseGPT's"),
        (f"{name}, magnitude: the same", spread(magnitude), "above SparseGPT's"),
    ]


def swept_rows(layers: list[tuple[Tensor, Tensor]]) -> list[tuple]:
    """What sweeps of coordinate descent take off, and cost, as multiples of the walk's."""
    found: dict[int, list[tuple[float, float]]] = {count: [] for count in SWEEPS}
    for weight, hessian in layers:
        seconds, alone = timed(lambda weight=weight, hessian=hessian: sparsegpt(weight, hessian, SPARSITY))
        for count in SWEEPS:
            longer, swept = timed(
                lambda weight=weight, hessian=hessian, count=count: (
                    prune_by_sparsegpt(weight, hessian, SPARSITY, sweeps=count).weight
                )
            )
            error = output_error(weight - swept, hessian) / output_error(weight - alone, hessian)
            found[count].append((error, longer / seconds))
    return [
        (
            f"1024×1024, 50 %, SparseGPT and {count} sweeps: output error ÷ the walk's alone",
            f"{spread([error for error, _ in pairs])}, {statistics.median(cost for _, cost in pairs):.1f}× the time",
            "",
        )
        for count, pairs in found.items()
    ]


def joint_rows(name: str, grid: Grid, layers: list[tuple[Tensor, Tensor]]) -> list[tuple]:
    """Half pruned and rounded; output errors as multiples of pruning's alone."""
    errors = []
    for weight, hessian in layers:
        found = prune_by_sparsegpt(weight, hessian, SPARSITY)
        joint = transcribed_sparsegpt(weight, hessian, None, grid)
        walk = round_by_gptq(weight, hessian, grid, keep_largest=grid.symmetric, pruned=found.mask)
        ours = round_by_gptq(weight, hessian, grid, keep_largest=grid.symmetric, pruned=found.mask, clip=True, sweeps=3)
        unit = output_error(weight - found.weight, hessian)
        rounded = (ours.weight, walk.weight, joint, round_to_grid(found.weight, grid))
        errors.append([output_error(weight - new, hessian) / unit for new in rounded])
    titles = (
        "SparseGPT's mask, then GPTQ as `quantize` does",
        "SparseGPT's mask, then GPTQ's walk alone",
        "in the published pass (§3.4)",
        "SparseGPT, then rounded to nearest",
    )
    columns = zip(*errors, strict=True)
    return [
        (f"96×768, 50 %, {name}: {title}, output error ÷ pruning's alone", spread(list(column)), "")
        for title, column in zip(titles, columns, strict=True)
    ]


def main() -> None:
    torch.set_num_threads(usable_cores())
    warm = layer(64, 256, 0)
    transcribed_sparsegpt(*warm)
    sparsegpt(*warm, SPARSITY)
    rows = []
    for out_features, width in SHAPES:
        layers = [layer(out_features, width, seed) for seed in SEEDS]
        for label, groups in (("50 %", None), ("2:4", KEEP)):
            name = f"{out_features}×{width}, {label}"
            rows += wanda_rows(name, layers, groups) + sparsegpt_rows(name, layers, groups)
    rows += swept_rows([layer(1024, 1024, seed) for seed in SEEDS])
    small = [layer(96, 768, seed) for seed in SEEDS]
    for name, grid in GRIDS.items():
        rows += joint_rows(name, grid, small)
    title = f"Pruning solvers against the published algorithms, float32, threads: {torch.get_num_threads()}, 3 seeds"
    keep("pruning_solvers", table(title, rows))


if __name__ == "__main__":
    main()
