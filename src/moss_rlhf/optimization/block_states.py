"""What enters and leaves blocks while a network runs, and which of its tokens are no padding.

Measured with hooks on the blocks themselves: `output_hidden_states` of several families has the last norm applied, or
what stands between two blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Anatomy, Block, Matrix

Batch = tuple[Mapping[str, Tensor], Tensor]  # (inputs of the network, labels)
Call = tuple[tuple[Any, ...], dict[str, Any]]

_IGNORED = -100  # labels of padding


def own_tokens(anatomy: Anatomy, block: Block, batch: Batch) -> Tensor:
    """(rows, length) bool, True inside the texts that this block reads: of a decoder beside an encoder the targets."""
    inputs, labels = batch
    if len(anatomy.family.stacks) > 1 and block.stack == "decoder":
        return labels != _IGNORED
    return inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()


def outputs_of(block: Block) -> tuple[Matrix, ...]:
    """The matrices that write into the stream: one an attention, then the feed-forward's."""
    return *(attention.output for attention in block.attentions), block.feed_forward.down


@dataclass
class Trace:
    """One run of one block.

    call       its arguments.
    entered    (rows, length, hidden), left likewise.
    features   what entered each matrix of `outputs_of`, written what it made of it; each (rows, length, ·).
    end        the stream at the end of the block, before the norm that closes it, where one does.
    closing    that norm's name in the block: "" where there is none (blocks that norm their inputs instead).
    """

    call: Call = ((), {})
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor = field(default_factory=lambda: torch.empty(0))
    features: list[Tensor] = field(default_factory=list)
    written: list[Tensor] = field(default_factory=list)
    end: Tensor = field(default_factory=lambda: torch.empty(0))
    closing: str = ""


@contextmanager
def traced(blocks: Sequence[Block], insides: bool = False) -> Iterator[list[Trace]]:
    """Trace each block's next run; with `insides`, also what its matrices and norms do."""
    traces = [Trace() for _ in blocks]
    with ExitStack() as hooks:
        for block, trace in zip(blocks, traces, strict=True):
            for handle in _hooks(block, trace, insides):
                hooks.callback(handle.remove)
        yield traces


def _hooks(block: Block, trace: Trace, insides: bool) -> Iterator[Any]:
    last_norm: list[Any] = ["", None, None]

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        trace.call, trace.entered = (args, kwargs), _hidden(args, kwargs)
        trace.features, trace.written = [], []

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        trace.left = output[0] if isinstance(output, tuple) else output
        closed = trace.left is last_norm[2]
        trace.closing, trace.end = (last_norm[0], last_norm[1]) if closed else ("", trace.left)

    def write(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        trace.features.append(args[0])
        trace.written.append(output)

    yield block.module.register_forward_pre_hook(enter, with_kwargs=True)
    yield block.module.register_forward_hook(leave)
    if insides:
        for matrix in outputs_of(block):
            yield matrix.module.register_forward_hook(write)
        for name, norm in block.module.named_modules():
            if "Norm" in type(norm).__name__:
                yield norm.register_forward_hook(_remember(last_norm, name))


def _remember(place: list[Any], name: str) -> Any:
    def remember(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        place[:] = [name, args[0], output]

    return remember


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    state: Tensor = args[0] if args else kwargs["hidden_states"]
    return state


def call_with(block: Block, call: Call, hidden: Tensor) -> None:
    """Run a block as it was called, on other hidden states."""
    args, kwargs = call
    if args:
        block.module(hidden, *args[1:], **kwargs)
    else:
        block.module(**{**kwargs, "hidden_states": hidden})


@contextmanager
def replaced(weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other values in these parameters, for a while."""
    own = {parameter: parameter.data for parameter in weights}
    for parameter, values in weights.items():
        parameter.data = values
    try:
        yield
    finally:
        for parameter, values in own.items():
            parameter.data = values
