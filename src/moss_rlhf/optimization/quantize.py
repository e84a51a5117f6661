"""Quantize: put weights on the int8 grid by rounding to the nearest point. The export realises exactly that grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.grid import quantized_weights, round_to_int8
from moss_rlhf.model.quantization import Quantization
from moss_rlhf.model.processor import fast_int8, processor_flags


@torch.no_grad()
def quantize(model: Model) -> dict[str, object]:
    """Round the weights to the int8 grid, in place, and declare the scheme; returns the facts.

    Activations are quantized by the runtime, from each batch's own range (dynamic quantization).
    raises   ModelError where the model is quantized already or holds inf or nan; nothing is changed then.
    """
    if model.quantization:
        raise ModelError(
            f"quantize: the model is quantized already ({model.quantization}); start from the checkpoint before."
        )
    weights = quantized_weights(model.network)
    rounded = {name: _rounded(name, parameter) for name, parameter in weights.items()}
    errors = {name: _relative(rounded[name] - parameter, parameter) for name, parameter in weights.items()}
    for name, parameter in weights.items():
        parameter.copy_(rounded[name])
    model.quantization = Quantization("int8")
    worst = sorted(errors, key=lambda name: -errors[name])[:3]
    return {
        "scheme": "int8, symmetric, one scale an output channel and a token; activations dynamic",
        "matrices": len(weights),
        "relative_error": sum(errors.values()) / len(errors),
        "worst": {name: errors[name] for name in worst},
        "faster_here": _verdict(fast_int8(processor_flags())),
    }


def _rounded(name: str, parameter: nn.Parameter) -> Tensor:
    try:
        return round_to_int8(parameter.detach())
    except ValueError as error:
        raise ModelError(
            f"quantize: {name}: {error}. Fine-tune again with a lower learning rate, or fetch the checkpoint again."
        ) from None


def _relative(difference: Tensor, weight: Any) -> float:
    return float(difference.norm() / weight.norm().clamp_min(1e-30))


def _verdict(fast: bool) -> str:
    if fast:
        return "yes: this processor multiplies int8 in hardware"
    return "somewhat: without VNNI, AMX or dot-product instructions int8 gains little; the report measures how much"
