"""Quantization-aware fine-tuning: the network computes with rounded weights while unrounded ones learn.

Forward with W' = round_to_grid(W), backward as if W' were W: dL/dW = dL/dW' (Jacob et al. 2017, arXiv:1712.05877, §3;
the straight-through estimator). The scale of a group is its largest weight's, rounded up, so no weight lies outside
the grid's range and none has its gradient cut off.

What is evaluated, and kept, are the rounded weights: `quantize` with the same scheme then changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moss_rlhf.errors import ModelError
from moss_rlhf.finetuning.companions import Companion
from moss_rlhf.finetuning.options import QuantizationAware
from moss_rlhf.finetuning.seen import see, straight_through, written
from moss_rlhf.model.anatomy import anatomy_of
from moss_rlhf.model.grid import Grid, round_to_grid, scheme_grid, scheme_matrices

_CODES = 255


def round_activations(value: Tensor, by_token: bool) -> Tensor:
    """What a runtime's 8 bits leave of the activations that enter a matrix; same shape and dtype.

    by_token   False: 256 codes over the range of the whole batch, 0 among them (ONNX's DynamicQuantizeLinear);
               True: codes −127 … 127 for each token (CTranslate2).
    value      (…, features).
    """
    found = value.detach().float()
    if by_token:
        scale = found.abs().amax(dim=-1, keepdim=True) / 127
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return ((found / scale).round() * scale).to(value.dtype)
    least, most = found.amin().clamp_max(0), found.amax().clamp_min(0)
    scale = (most - least) / _CODES
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-least / scale).round().clamp(0, _CODES)
    codes = ((found / scale).round() + zero).clamp(0, _CODES)
    return ((codes - zero) * scale).to(value.dtype)


class Rounding(Companion):
    """Every module that holds a weight of the scheme computes with it rounded."""

    name = "quantization_aware"
    alters_forward = True

    def __init__(self, network: Any, options: QuantizationAware) -> None:
        self.network, self.options = network, options
        self.grid = scheme_grid(options.scheme, options.group_size)
        self.matrices = scheme_matrices(network, options.scheme)
        for matrix in self.matrices:
            try:
                self.grid.group_width(matrix.in_features)
            except ValueError as error:
                raise ModelError(f"finetune.quantization_aware: {matrix.name}: {error}.") from None
        self.handles: list[RemovableHandle] = []
        self.shipping = False

    def before_step(self, step: int) -> None:
        if not self.handles:
            self._install()

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    @contextmanager
    def as_shipped(self) -> Iterator[None]:
        rounded = [_round(matrix.parameter.detach(), self.grid, matrix.transposed) for matrix in self.matrices]
        self.shipping = True  # rounding twice changes nothing, but costs
        try:
            with written([matrix.parameter for matrix in self.matrices], rounded):
                yield
        finally:
            self.shipping = False

    def _install(self) -> None:
        turned = {id(matrix.parameter): matrix.transposed for matrix in self.matrices}
        blocks = {id(matrix.module) for matrix in anatomy_of(self.network).matrices}
        for module in self.network.modules():
            weight = module._parameters.get("weight")
            if id(weight) not in turned:
                continue
            if type(module) is nn.Embedding:  # its rows have scales of their own: only those looked up are rounded
                self.handles.append(module.register_forward_hook(self._rounded_rows))
            else:
                self.handles.extend(see(module, partial(self._rounded, transposed=turned[id(weight)])))
            if id(module) in blocks and self.options.activations:
                self.handles.append(module.register_forward_pre_hook(self._rounded_inputs))

    def _rounded(self, weight: Tensor, transposed: bool) -> Tensor:
        if self.shipping:
            return weight
        return straight_through(weight, partial(_round, grid=self.grid, transposed=transposed))

    def _rounded_rows(self, _: nn.Module, __: Any, rows: Tensor) -> Tensor:
        if self.shipping:
            return rows
        return straight_through(rows, lambda value: _round(value.flatten(0, -2), self.grid, False).view_as(value))

    def _rounded_inputs(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        by_token = anatomy_of(self.network).family.kind != "encoder"
        return straight_through(inputs[0], partial(round_activations, by_token=by_token)), *inputs[1:]

    def finish(self) -> dict[str, Any]:
        return {"quantization_aware": self.options.scheme}


def _round(weight: Tensor, grid: Grid, transposed: bool) -> Tensor:
    try:
        rounded = round_to_grid(weight.T if transposed else weight, grid)
    except ValueError:
        raise ModelError(
            "finetune.quantization_aware: a weight is no longer finite. Lower learning_rate, or look for inf or nan in "
            "the checkpoint."
        ) from None
    return (rounded.T if transposed else rounded).to(weight.dtype)
