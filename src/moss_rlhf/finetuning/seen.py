"""What a module computes with in place of its weight, while the parameter and its name stay what they are.

A hook before the module's forward puts a function of the weight into the instance's own attributes, which Python finds
before a module's parameters; a hook after it takes it away again. So

- gradients flow through the function to the parameter itself, and autograd keeps the tensor that it needs: nothing is
  changed in place, in the forward or the backward pass;
- a block that is computed anew in the backward pass (gradient checkpointing) sees the same, for hooks run there too;
- state_dict, the optimizer and every method that looks at the network find the parameter where it was;
- two such functions on one module follow each other in the order of their hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def see(module: nn.Module, change: Callable[[Tensor], Tensor]) -> tuple[RemovableHandle, ...]:
    """Let `module` compute with change(weight) until the handles are removed."""

    def before(module: nn.Module, _: Any) -> None:
        module.__dict__["weight"] = change(module.weight)  # type: ignore[arg-type]  # every module here has one

    def after(module: nn.Module, *_: Any) -> None:
        module.__dict__.pop("weight", None)

    return module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return change(value)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """change(value), with the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432, §4); exactly its value."""
    changed: Tensor = _Straight.apply(value, change)  # type: ignore[no-untyped-call]
    return changed


@contextmanager
def written(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """The parameters hold `values`, and afterwards what they held before, bit for bit."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        _write(parameters, values)
        yield
    finally:
        _write(parameters, before)


@torch.no_grad()
def _write(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
