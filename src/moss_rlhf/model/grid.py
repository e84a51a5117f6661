"""Integer grids for weights: weight = (code − zero) · scale, one scale and zero for a group of neighbours in a row.

A row is an output channel of a linear layer or a token of an embedding table; a group is `group_size` consecutive
input features of it, or the whole row. Two kinds, both holding an exact zero, so that pruned weights stay pruned:

    symmetric    codes −L … L, zero 0. The scale is rounded *up*, so the largest weight of a group has code ±L,
                 and max|weight| / L gives the scale back.
    asymmetric   codes 0 … L, zero among them. The scale is rounded *down*, so the smallest weight (or 0) has
                 code 0 and the largest (or 0) code L, and (max − min) / L gives the scale back. Rounded up,
                 both ends can fall short by half a step, and the range no longer tells the scale.

**What is measured in PyTorch and what is shipped are one model**, because a scale keeps few significant bits:

    16 bits   the default, for runtimes that store scales in float32 (ONNX, CTranslate2). At most 8 + 16 = 24 bits,
              so (code − zero) · scale is exact in float32, and weight / scale is the code again.
    8 bits    for runtimes that hold scales in the network's own type (vLLM): exact in bfloat16, and in float16 from
              2⁻¹⁷ on. For codes of up to 6 bits. A step is at most 0.8 % off the best: the error of one layer moves
              by a few per cent either way, hardly on average (benchmarks/quantization_solvers.py).

So a rounded weight is a fixed point: rounding it again, with the stored scales or with scales found anew, gives the
same codes, zeros and scales bit for bit. An algorithm that moves weights before it rounds them (GPTQ) may leave the
ends of a group unreached: then the scales are stored beside the weight (`grid_codes` finds the codes from them), or
the ends are held in place (gptq's `keep_largest`).

How runtimes say it: compressed-tensors stores b-bit codes as −2ᵇ⁻¹ … 2ᵇ⁻¹ − 1, which hold −L … L as they are, and
0 … L with 2ᵇ⁻¹ taken off codes and zeros alike. CTranslate2's converter finds its own int8 codes, round(weight · 127 /
max|row|); the export shrinks them to ours.

`INT8`, the grid of every int8 export, has codes −64 … 64. Why not 127: processors without VNNI add pairs of products of
an unsigned activation and a signed weight in 16 bits, and saturate silently; 2 · 255 · 64 < 2¹⁵ fits, so the file
gives the same sums on every processor (measured in docs/LOG.md). A group so small that float32 has no bits left for
its scale (below 1e-38) becomes zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Matrix, anatomy_of

LARGEST_CODE = 64


@dataclass(frozen=True)
class Grid:
    """Which codes there are, and how many weights share a scale. Made by `integer_grid`, or INT8.

    lowest       −highest (symmetric) or 0 (asymmetric).
    group_size   consecutive weights of a row that share a scale; None: the whole row.
    scale_bits   significant bits of a scale.
    """

    lowest: int
    highest: int
    group_size: int | None = None
    scale_bits: int = 16

    @property
    def symmetric(self) -> bool:
        return self.lowest < 0

    def group_width(self, width: int) -> int:
        """How many weights share a scale in rows of `width`; ValueError where groups do not fill a row evenly."""
        size = width if self.group_size is None else self.group_size
        if width % size or not width:
            raise ValueError(
                f"group_size {size} does not divide rows of {width} weights; "
                f"give a divisor of {width}, or None for one group a row"
            )
        return size


INT8 = Grid(-LARGEST_CODE, LARGEST_CODE)


def integer_grid(bits: int, group_size: int | None = None, *, symmetric: bool = True, scale_bits: int = 16) -> Grid:
    """The grid of `bits` bits: codes −(2ᵇ⁻¹ − 1) … 2ᵇ⁻¹ − 1 if symmetric, 0 … 2ᵇ − 1 if not.

    bits         2 … 8.
    group_size   weights that share a scale, it must divide the row; None or -1: the whole row.
    scale_bits   significant bits of a scale, bits + 2 … 16: 16 for float32, 8 for scales that live in bfloat16.
    raises       ValueError on bits, a group size or scale_bits out of range.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    size = None if group_size in (None, -1) else group_size
    if size is not None and size < 1:
        raise ValueError(f"group_size must be at least 1, or None or -1 for one group a row, got {group_size}")
    if not bits + 2 <= scale_bits <= 16:  # coarser, the largest weight misses the largest code; finer, float32 rounds
        raise ValueError(f"scale_bits must be {bits + 2} to 16 for codes of {bits} bits, got {scale_bits}")
    highest = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    return Grid(-highest if symmetric else 0, highest, size, scale_bits)


def scheme_grid(scheme: str, group_size: int | None = 128) -> Grid:
    """The grid of a scheme, as the runtimes hold it (docs/quantize.md).

    group_size   int4: weights of a row that share a scale.
    """
    if scheme == "int4":
        return integer_grid(4, group_size, scale_bits=8)  # vLLM holds scales in the network's own type
    return INT8


def grid_parameters(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale, float32, and the zero, int32, of each group: both (rows, groups). A group of zeros has scale 1.

    weight   (rows, width), float32 or less, finite.
    raises   ValueError where the weight holds inf or nan, or the groups do not fill a row.
    """
    groups = _grouped(weight, grid)
    return scale_and_zero(groups.amin(dim=2), groups.amax(dim=2), grid)  # aminmax is ten times slower


def scale_and_zero(least: Tensor, most: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scale, float32, and the zero, int32, of groups whose weights lie in least … most; any shape."""
    least, most = least.double(), most.double()
    if not is_finite(least) or not is_finite(most):
        raise ValueError("weight is not finite: the checkpoint holds inf or nan")
    if grid.symmetric:
        scale = _few_bits(torch.maximum(-least, most) / grid.highest, grid.scale_bits, torch.ceil)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    least, most = least.clamp_max(0), most.clamp_min(0)
    scale = _few_bits((most - least) / grid.highest, grid.scale_bits, torch.floor)
    return scale, (-least / scale).round().clamp(0, grid.highest).to(torch.int32)


def is_finite(value: Tensor) -> bool:
    """Whether a tensor holds neither inf nor nan, without a second one of its size."""
    return bool(torch.stack([value.amin(), value.amax()]).isfinite().all())


def _few_bits(value: Tensor, bits: int, towards: Callable[[Tensor], Tensor]) -> Tensor:
    """Round float64 >= 0 to `bits` significant bits, float32; 1 where float32 has too few bits left."""
    mantissa, exponent = torch.frexp(value)
    rounded = torch.ldexp(towards(mantissa * 2**bits), exponent - bits)
    smallest = 2.0 ** (bits - 149)  # float32 counts in steps of 2^-149 down there
    return torch.where(rounded >= smallest, rounded, torch.ones_like(rounded)).float()


def grid_codes(weight: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Round to the nearest code, ties to even: (rows, width), int8 if symmetric, uint8 if not.

    weight        (rows, width), float32 or less.
    scale, zero   (rows, groups), from `grid_parameters` or stored with the checkpoint.
    """
    steps = (_grouped(weight, grid) / scale[:, :, None]).round() + zero[:, :, None]
    codes = steps.clamp(grid.lowest, grid.highest).reshape(weight.shape)
    return codes.to(torch.int8 if grid.symmetric else torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(code − zero) · scale, (rows, width) float32, exact. codes (rows, width); scale and zero (rows, groups)."""
    steps = codes.reshape(*scale.shape, -1).float() - zero[:, :, None]
    return (steps * scale[:, :, None]).reshape(codes.shape)


def round_to_grid(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest weight on the grid, float32; a weight that was rounded before stays as it is, bit for bit.

    weight   (rows, width), float32 or less, finite.
    raises   ValueError where the weight holds inf or nan, or the groups do not fill a row.
    """
    scale, zero = grid_parameters(weight, grid)
    return dequantize(grid_codes(weight, scale, zero, grid), scale, zero)


def _grouped(weight: Tensor, grid: Grid) -> Tensor:
    """(rows, groups, group width) float32."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be (rows, width), got {tuple(weight.shape)}")
    return weight.float().reshape(len(weight), -1, grid.group_width(weight.shape[1]))


def int8_scale(weight: Tensor) -> Tensor:
    """The scale of each row on INT8, (rows, 1) float32; 1 for a row of zeros, or of weights too small for the grid.

    weight   (rows, width), float32, finite.
    raises   ValueError where the weight holds inf or nan.
    """
    return grid_parameters(weight, INT8)[0]


def int8_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Round to the nearest code of INT8, int8."""
    return grid_codes(weight, scale, torch.zeros_like(scale), INT8)


def round_to_int8(weight: Tensor) -> Tensor:
    """The nearest weight on INT8, float32; a weight on the grid stays as it is, bit for bit.

    weight   (rows, width), float32.
    """
    return round_to_grid(weight, INT8)


def quantized_tables(network: Any) -> tuple[Matrix, ...]:
    """The embedding tables that int8 quantizes along with the blocks' matrices, a scale a row.

    An encoder's are all of its tables. A decoder's are the words', whether the head shares them or has its own: its
    runtime keeps positions in float.
    """
    anatomy = anatomy_of(network)
    if anatomy.family.kind == "encoder":
        whole = [network.base_model.get_submodule(name) for name in anatomy.family.floating]
        found = [module for module in network.modules() if isinstance(module, nn.Embedding) and module not in whole]
    else:
        found = [network.get_input_embeddings(), network.get_output_embeddings()]
    names = {id(module): name for name, module in network.named_modules()}
    own = {id(module.weight): module for module in reversed(found) if module is not None}  # tied ones once
    return tuple(Matrix(f"{names[id(module)]}.weight", module) for module in own.values())


def scheme_matrices(network: Any, scheme: str) -> tuple[Matrix, ...]:
    """What a scheme rounds: the blocks' matrices, and with int8 the embedding tables."""
    return anatomy_of(network).matrices + (() if scheme == "int4" else quantized_tables(network))


def quantized_weights(network: Any) -> dict[str, nn.Parameter]:
    """The named parameters that int8 quantizes: the matrices of the blocks, and the embedding tables.

    The head of a classifier stays in float32: it is a thousandth of the weights and decides the answer.
    """
    found = {id(matrix.parameter) for matrix in (*anatomy_of(network).matrices, *quantized_tables(network))}
    return {name: value for name, value in network.named_parameters() if id(value) in found}
