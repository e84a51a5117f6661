"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import Model


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Mark the weights of smallest magnitude in one matrix (Han et al. 2015, arXiv:1506.02626, §3).

    weight     any shape, any float dtype, finite. It is not changed.
    sparsity   share of the matrix to remove, 0 <= sparsity < 1, rounded down to whole weights; ties go by position.
    returns    bool, the weight's shape, True where a weight is to be zeroed.
    raises     ValueError on sparsity out of range or a weight that is not finite.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    if not weight.isfinite().all():
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    flat = weight.detach().abs().flatten()
    lowest = flat.argsort(stable=True)[: int(flat.numel() * sparsity)]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, lowest, True).reshape(weight.shape)


@torch.no_grad()
def prune(model: Model, sparsity: float) -> dict[str, object]:
    """Zero the smallest weights of every matrix in the blocks, each by the same share; returns the facts.

    The zeros stay zero in later fine-tuning. Shapes stay: no runtime of today is faster for it.
    raises   ModelError on a quantized model, inf or nan, sparsity outside [0, 1), or one that removes nothing.
    """
    if model.quantization:
        raise ModelError("prune: the model is quantized already; prune it before, then quantize.")
    weights = _matrices(model)
    masks = [_mask(name, weight, sparsity) for name, weight in weights.items()]
    for weight, mask in zip(weights.values(), masks, strict=True):
        weight[mask] = 0
    known = {id(parameter) for parameter in model.pruned}
    model.pruned += [weight for weight in weights.values() if id(weight) not in known]
    total = sum(weight.numel() for weight in weights.values())
    zeros = total - sum(int(torch.count_nonzero(weight)) for weight in weights.values())
    return {
        "zeroed": zeros,
        "of": total,
        "sparsity": zeros / total,
        "faster_here": "no: unstructured zeros keep every shape, and ONNX Runtime multiplies them like any number",
    }


def _matrices(model: Model) -> dict[str, nn.Parameter]:
    linears = {id(linear.weight) for block in model.anatomy.blocks for linear in block.linears}
    return {name: value for name, value in model.network.named_parameters() if id(value) in linears}


def _mask(name: str, weight: Tensor, sparsity: float) -> Tensor:
    try:
        mask = magnitude_mask(weight, sparsity)
    except ValueError as error:
        raise ModelError(f"prune: {name}: {error}. Give a share such as 0.5, or an unbroken checkpoint.") from None
    if not mask.any():
        raise ModelError(
            f"prune: sparsity {sparsity} is less than one of {name}'s {weight.numel()} weights. Give a larger share."
        )
    return mask
