"""Move scales from what makes activations into what reads them, before rounding: the driver of SmoothQuant and AWQ.

The network computes what it did, up to the rounding of float32; only its ranges differ. Where a scale may move is told
by `Block.foldings`: from a norm into the matrices behind it, where nothing else reads the norm (pre-norm blocks); from
values into the attention's output projection; from `up` into `down` of a gated feed-forward.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Folding
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.grid import Grid
from moss_rlhf.model.replay import Batch, Gather, InputStatistics, calibrate
from moss_rlhf.optimization.awq import awq_scales
from moss_rlhf.optimization.smoothquant import fold_scales, smoothing_scales
from moss_rlhf.progress import Progress

Choose = Callable[[Folding, InputStatistics], Tensor]


def smooth_activations(
    model: Model, batches: Sequence[Batch], alpha: float, progress: Progress | None = None
) -> dict[str, object]:
    """SmoothQuant (Xiao et al. 2022, arXiv:2211.10438), in place; returns the facts.

    alpha    how much moves into the weights, in [0, 1].
    raises   ModelError where an activation is not finite.
    """

    def choose(folding: Folding, found: InputStatistics) -> Tensor:
        weights = torch.stack([reader.weight.abs().amax(dim=0) for reader in folding.followers]).amax(dim=0)
        activations = _of_makers(found.absolute_maximum.to(weights), folding, "amax")
        return smoothing_scales(activations, _of_makers(weights, folding, "amax"), alpha)

    return {"smoothed": _rescale(model, batches, choose, "norms", "smoothing", progress)} | _left(model)


def scale_for_awq(
    model: Model, batches: Sequence[Batch], grid: Grid, progress: Progress | None = None
) -> dict[str, object]:
    """AWQ's scales for `grid` (Lin et al. 2023, arXiv:2306.00978, §3.2), in place; returns the facts.

    raises   ModelError where an activation is not finite, or groups do not fill a row.
    """
    removed: list[float] = []

    def choose(folding: Folding, found: InputStatistics) -> Tensor:
        weight = torch.cat([reader.weight for reader in folding.followers])
        gram = found.gram if found.gram is not None else torch.diag(found.squared_norm)
        activation = _of_makers(found.absolute_sum.float().to(weight.device), folding, "mean")
        best = awq_scales(weight, gram.to(weight), activation, grid)
        removed.append(1 - best.error / best.plain if best.plain else 0.0)
        return best.scales

    counts = _rescale(model, batches, choose, "grams", "scaling", progress)
    return {"scaled": counts, "rounding_error_removed": sum(removed) / len(removed)} | _left(model)


def fold(folding: Folding, scales: Tensor) -> None:
    """Divide a maker's outputs by `scales` (in,) and multiply its readers' inputs; in place, pruned zeros stay zero.

    raises   ValueError on scales of another length, or not positive and finite.
    """
    maker, rows = _Maker(folding), torch.tensor(folding.rows, device=scales.device)
    weight, bias, followers = fold_scales(
        scales,
        maker.weight[rows],
        None if maker.bias is None else maker.bias[rows],
        [reader.weight for reader in folding.followers],
        unit_offset=folding.unit_offset,
    )
    maker.weight[rows] = weight  # rows that several features share are written several times, the same each time
    if maker.bias is not None and bias is not None:
        maker.bias[rows] = bias
    for reader, scaled in zip(folding.followers, followers, strict=True):
        reader.weight.copy_(scaled)


class _Maker:
    """Weight (entries or rows first) and bias of what makes activations: views."""

    def __init__(self, folding: Folding) -> None:
        parameters = dict(folding.module.named_parameters(recurse=False))
        weight, bias = parameters["weight"].data, parameters.get("bias")
        self.weight = weight.T if type(folding.module).__name__ == "Conv1D" else weight
        self.bias = None if bias is None else bias.data


def _of_makers(values: Tensor, folding: Folding, how: str) -> Tensor:
    """(in,) for the inputs of the readers: where several come from one row of the maker, the same for all of them."""
    rows = torch.tensor(folding.rows, device=values.device)
    merged = values.new_zeros(int(rows.max()) + 1).scatter_reduce(0, rows, values, how, include_self=False)
    return merged[rows]


def _rescale(
    model: Model, batches: Sequence[Batch], choose: Choose, gather: Gather, title: str, progress: Progress | None
) -> dict[str, int]:
    """Fold a scale wherever one can move; {where: in how many blocks}."""
    counts: Counter[str] = Counter()
    with torch.no_grad():
        for visit in calibrate(model, batches, gather=gather, progress=progress, title=title):
            for folding in visit.block.foldings:
                try:
                    fold(folding, choose(folding, visit.statistics[folding.followers[0].name]))
                except ValueError as error:
                    raise ModelError(f"quantize: {visit.block.name}.{folding.name}: {error}.") from None
                counts[folding.name] += 1
    return dict(counts)


def _left(model: Model) -> dict[str, object]:
    """The matrices whose inputs no scale can leave, by example."""
    matrices, foldings = model.anatomy.matrices, [each for block in model.anatomy.blocks for each in block.foldings]
    reached = {reader.name for folding in foldings for reader in folding.followers}
    left = [matrix.name for matrix in matrices if matrix.name not in reached]
    return {"not_rescaled": f"{len(left)} of {len(matrices)} matrices, such as {left[0]}: {_WHY}"} if left else {}


_WHY = (
    "what they read goes elsewhere too (a norm's output that is also the residual, the encoder's states), or comes out "
    "of a nonlinearity"
)
