"""Quantize: put weights on an integer grid. The exports of the same scheme realise exactly that grid.

The driver; the solvers are `round_to_grid` (nearest), GPTQ, and SparseGPT for pruning in the same pass. Before them,
SmoothQuant or AWQ may move scales between the layers (`scaling.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Matrix
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.damage import after_pruning, after_rounding
from moss_rlhf.model.grid import Grid, quantized_tables, round_to_grid, scheme_grid
from moss_rlhf.model.processor import fast_int8, processor_flags
from moss_rlhf.model.quantization import Quantization, Scheme
from moss_rlhf.model.replay import Batch, InputStatistics, calibrate, visit_blocks
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.fallbacks import DAMPING, Fallbacks
from moss_rlhf.optimization.gptq import round_by_gptq
from moss_rlhf.optimization.scaling import scale_for_awq, smooth_activations
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.optimization.sparsegpt import prune_by_sparsegpt
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import QuantizeSpec, combination_fault
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks.loading import encoded

_SWEEPS = 3  # the first takes most of what there is; ten gain a hundredth more
_SCHEMES: Mapping[str, str] = {
    "int8": "int8, symmetric, one scale an output channel and a token; activations dynamic",
    "int8_static": "int8, symmetric, one scale an output channel and a token; activations in fixed ranges",
    "int4": "int4, symmetric, weights only",
}


@takes_model
@follows(QuantizeSpec, "quantize")
def quantize(
    model: Model,
    train: Any = None,
    *,
    scheme: Scheme = "int8",
    method: Literal["nearest", "gptq", "awq"] = "nearest",
    smooth: float = 0.0,
    group_size: int = 128,
    activation_order: bool | None = None,
    sparsity: float = 0.0,
    rows: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Round the weights to the scheme's grid, in place, and declare it; returns the facts. Zeros stay zeros.

    train              rows; `rows` of them, drawn by `seed`, are what gptq, awq, smooth and int8_static measure on.
    scheme             int8 (matrices and embedding tables; the runtime quantizes activations by each batch's range),
                       int8_static (in ranges measured here), or int4 (the blocks' matrices only, `group_size` weights
                       of a row sharing a scale).
    method             nearest; gptq (Frantar et al. 2022, arXiv:2210.17323): errors are made up for, block by block; or
                       awq (Lin et al. 2023, arXiv:2306.00978): input features of large activations are scaled up
                       before rounding to nearest.
    smooth             int8, int8_static: SmoothQuant's alpha (Xiao et al. 2022, arXiv:2211.10438), how much of the
                       activations' outliers moves into the weights, up to 1; 0: off.
    activation_order   gptq: columns of large inputs first, which is on unless False; nothing to the other methods.
    sparsity           gptq: this share of every matrix becomes zero in the same pass (arXiv:2301.00774, §3.4).
    raises             RecipeError on an option that a recipe could not hold;
                       ModelError where the model is quantized already or holds inf or nan, a group does not fill a row
                       evenly, or options do not go together; nothing is changed then. ModelError where an activation
                       is not finite; DataError where there are no rows.
    """
    _refuse(model, scheme, method, smooth, activation_order, sparsity, train)
    grid = scheme_grid(scheme, group_size)
    _refuse_misfits(model, grid)
    progress, notes = progress or Progress(quiet=True), dict[str, object]()
    batches: list[Batch] = []
    if measures(scheme, method, smooth):
        sample = calibration_rows(encoded(model, train), rows, seed)
        batches = list(labelled_batches(model, sample))
        notes["rows_measured"] = len(sample)
    if smooth:
        notes |= smooth_activations(model, batches, smooth, progress)
    if method == "awq":
        notes |= scale_for_awq(model, batches, grid, progress)
    solver = _Solver(model, grid, method, activation_order is not False, sparsity)
    solver.run(batches if method == "gptq" or scheme == "int8_static" else [], progress)
    if scheme != "int4":
        for table in quantized_tables(model.network):
            solver.write(table, round_to_grid(table.weight, grid))
    ranges = solver.ranges if scheme == "int8_static" else {}
    model.quantization = Quantization(scheme, group_size if scheme == "int4" else None, ranges)
    spent = after_pruning(model.sensitivity, dict.fromkeys((block.name for block in model.anatomy.blocks), sparsity))
    model.sensitivity = after_rounding(spent, 4 if scheme == "int4" else 8)
    return _facts(solver.errors, scheme, method) | notes | solver.fallbacks.facts()


def measures(scheme: str, method: str, smooth: float) -> bool:
    """Whether rows are needed."""
    return method != "nearest" or scheme == "int8_static" or smooth > 0


class _Solver:
    """Rounds one matrix after the other by what entered it."""

    def __init__(self, model: Model, grid: Grid, method: str, activation_order: bool, sparsity: float) -> None:
        self.model, self.grid, self.method = model, grid, method
        self.activation_order, self.sparsity = activation_order, sparsity
        self.pruned = {id(parameter) for parameter in model.pruned}
        self.ranges: dict[str, tuple[float, float]] = {}
        self.fallbacks = Fallbacks()
        self.errors: dict[str, float] = {}

    def run(self, batches: Sequence[Batch], progress: Progress) -> None:
        """Round every matrix of the blocks; without batches, to nearest."""
        if not batches:
            for block in visit_blocks(self.model):
                for matrix in block.matrices:
                    self.write(matrix, round_to_grid(matrix.weight, self.grid))
            return
        for visit in calibrate(
            self.model, batches, gather="grams" if self.method == "gptq" else "norms", progress=progress
        ):
            for matrix in visit.block.matrices:
                self.solve(matrix, visit.statistics.pop(matrix.name))

    def solve(self, matrix: Matrix, found: InputStatistics) -> None:
        self.ranges[matrix.name] = (min(found.least, 0.0), max(found.most, 0.0))
        if self.method != "gptq" or found.gram is None:
            self.write(matrix, round_to_grid(matrix.weight, self.grid))
            return
        try:
            weight, used = self._rounded(matrix, found.gram)
        except ValueError as error:
            raise ModelError(f"quantize: {matrix.name}: {error}.") from None
        self.write(matrix, weight)
        self.fallbacks.note(matrix.name, damping=used, tokens=found.tokens, width=matrix.in_features)

    def write(self, matrix: Matrix, weight: Tensor) -> None:
        self.errors[matrix.name] = float((weight - matrix.weight).norm() / matrix.weight.norm().clamp_min(1e-30))
        matrix.weight.copy_(weight)

    def _rounded(self, matrix: Matrix, gram: Tensor) -> tuple[Tensor, float]:
        found = round_by_gptq(
            matrix.weight,
            gram,
            self.grid,
            activation_order=self.activation_order,
            keep_largest=True,  # the scales must follow from the weights: they are not stored
            damping=DAMPING,
            pruned=self._zeros(matrix, gram),
            clip=True,
            sweeps=_SWEEPS,
        )
        return found.weight, found.damping

    def _zeros(self, matrix: Matrix, gram: Tensor) -> Tensor | None:
        """What must be zero: SparseGPT chooses, and GPTQ's one pass makes up for pruning and rounding together."""
        known = id(matrix.parameter) in self.pruned
        zeros = matrix.weight == 0 if known else None
        if not self.sparsity:
            return zeros
        if not known:
            self.model.pruned.append(matrix.parameter)
        chosen = prune_by_sparsegpt(matrix.weight, gram, self.sparsity, damping=DAMPING).mask
        return chosen if zeros is None else chosen | zeros


def _refuse(
    model: Model,
    scheme: str,
    method: str,
    smooth: float,
    activation_order: bool | None,
    sparsity: float,
    train: Any,
) -> None:
    if model.quantization:
        raise ModelError(
            f"quantize: the model is quantized already ({model.quantization}); start from the checkpoint before."
        )
    if fault := combination_fault(scheme, method, smooth, activation_order, sparsity):
        raise ModelError(f"quantize: {fault}")
    if scheme == "int8_static" and model.anatomy.family.kind != "encoder":
        raise ModelError("quantize: int8_static is for encoders, whose runtime takes fixed ranges. Give scheme int8.")
    if train is None and measures(scheme, method, smooth):
        raise ModelError(f"quantize: method {method} with scheme {scheme} measures on rows; give training rows.")


def _refuse_misfits(model: Model, grid: Grid) -> None:
    for matrix in model.anatomy.matrices:
        try:
            grid.group_width(matrix.in_features)
        except ValueError as error:
            raise ModelError(f"quantize: {matrix.name}: {error}.") from None
    refuse_not_finite(model, "quantize")


def _facts(errors: Mapping[str, float], scheme: str, method: str) -> dict[str, object]:
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    bits, mean = (4 if scheme == "int4" else 8), sum(errors.values()) / len(errors)
    return {
        "removed": f"{32 - bits} of the 32 bits of each weight of {len(errors)} matrices",
        "measured": f"the weights moved by {100 * mean:.2g} % of their norm on average",
        "scheme": _SCHEMES[scheme],
        "method": method,
        "matrices": len(errors),
        "relative_error": mean,
        "worst": {name: errors[name] for name in worst},
        "faster_here": _verdict(scheme, fast_int8(processor_flags())),
    }


def _verdict(scheme: str, fast: bool) -> str:
    if scheme == "int4":
        return "no: int4 weights are for vLLM on a GPU; no runtime here multiplies them"
    if fast:
        return "yes, once exported: this processor multiplies int8 in hardware; in PyTorch the weights stay float32"
    return (
        "somewhat, once exported: without VNNI, AMX or dot-product instructions int8 gains little; the report measures "
        "how much"
    )
