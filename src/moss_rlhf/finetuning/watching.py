"""What leaves the blocks of a network while it runs, and the queries, keys and values inside: by hooks on its parts.

`output_hidden_states` of several families has the last norm applied, and `output_attentions` forbids the fast kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from moss_rlhf.model.anatomy import Anatomy, Attention, Block

Parts = tuple[Tensor, ...]  # queries, keys, values; each (rows, length, heads · head size)


@dataclass
class Seen:
    """Of one forward pass: what every module gave out, call by call."""

    anatomy: Anatomy
    calls: dict[int, list[Tensor]] = field(default_factory=dict)

    def state(self, layer: int) -> Tensor:
        """(rows, length, hidden), as it left a layer."""
        block, call = self._place(layer)
        return self.calls[id(block.module)][call]

    def parts(self, layer: int) -> Parts:
        """Queries, keys and values of a layer's self-attention, as the projections make them: before any rotation."""
        block, call = self._place(layer)
        attention = block.attention
        # the first: DeBERTa puts relative positions through the same projections, afterwards
        made = [self.calls[id(producer.module)][call] for producer in attention.producers[:3]]
        return _unfused(made[0], attention) if attention.row.fused else tuple(made)

    def _place(self, layer: int) -> tuple[Block, int]:
        """The block that is a layer, and which of its calls: one block may serve as all of them."""
        shared = self.anatomy.repeats > 1
        return (self.anatomy.blocks[0], layer) if shared else (self.anatomy.blocks[layer], 0)


def _unfused(made: Tensor, attention: Attention) -> Parts:
    if attention.row.fused == "one after the other":
        return made.chunk(3, dim=-1)
    by_head = made.view(*made.shape[:-1], -1, 3, attention.head_size)
    return tuple(by_head[..., part, :].flatten(-2) for part in range(3))


@contextmanager
def watching(anatomy: Anatomy, layers: Sequence[int], states: bool, parts: bool) -> Iterator[Seen]:
    """Watch these layers while the block runs: what leaves them, and what their self-attentions attend with."""
    seen, watched = Seen(anatomy), [anatomy.blocks[0 if anatomy.repeats > 1 else layer] for layer in layers]
    modules = {id(block.module): block.module for block in watched if states}
    producers = [matrix.module for block in watched if parts for matrix in block.attention.producers[:3]]
    modules |= {id(module): module for module in producers}
    with ExitStack() as hooks:
        for module in modules.values():
            hooks.callback(module.register_forward_hook(_keep(seen)).remove)
        yield seen


def _keep(seen: Seen) -> Any:
    def keep(module: nn.Module, _: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        seen.calls.setdefault(id(module), []).append(value)

    return keep
