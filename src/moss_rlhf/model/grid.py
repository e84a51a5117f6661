"""The int8 grid: symmetric, one scale a row: an output channel of a linear layer, a token of an embedding table.

weight = code · scale, code in −64 … 64. Why not 127: processors without VNNI add pairs of products of an unsigned
activation and a signed weight in 16 bits, and saturate silently; 2 · 255 · 64 < 2¹⁵ fits, so the file gives the same
sums on every processor (measured in docs/LOG.md). A scale is rounded up to 16 significant bits. Then every product
code · scale is exact in float32 (7 + 16 < 24 bits), max|weight| / 64 gives the scale back exactly, and any exporter
that quantizes by the largest weight finds the very same codes and scales: what is measured in PyTorch and what is
shipped are one model. A row so small that float32 has no 16 bits left for its scale (below 1e-38) becomes zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import anatomy_of

LARGEST_CODE = 64
_SCALE_BITS = 16
_SMALLEST_SCALE = 2.0 ** (-149 + _SCALE_BITS)  # float32 counts in steps of 2^-149 down there


def int8_scale(weight: Tensor) -> Tensor:
    """The scale of each row, (rows, 1) float32; 1 for a row of zeros, or of weights too small for the grid.

    weight   (rows, width), float32, finite.
    raises   ValueError where the weight holds inf or nan.
    """
    if not weight.isfinite().all():
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    largest = weight.abs().amax(dim=1, keepdim=True)
    mantissa, exponent = torch.frexp(largest.double() / LARGEST_CODE)
    rounded = torch.ldexp(torch.ceil(torch.ldexp(mantissa, torch.tensor(_SCALE_BITS))), exponent - _SCALE_BITS)
    return torch.where(rounded >= _SMALLEST_SCALE, rounded, torch.ones_like(rounded)).float()


def int8_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Round to the nearest code, int8."""
    return (weight / scale).round().clamp(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)


def round_to_int8(weight: Tensor) -> Tensor:
    """The nearest weight on the grid, float32; a weight on the grid stays as it is, bit for bit.

    weight   (rows, width), float32.
    """
    scale = int8_scale(weight)
    return int8_codes(weight, scale).float() * scale


def quantized_weights(network: Any) -> dict[str, nn.Parameter]:
    """The named parameters that int8 quantizes: the matrices of the blocks, and the embedding tables.

    The head stays in float32: it is a thousandth of the weights and decides the answer.
    """
    linears = {id(linear.weight) for block in anatomy_of(network).blocks for linear in block.linears}
    tables = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    return {name: value for name, value in network.named_parameters() if id(value) in linears | tables}
