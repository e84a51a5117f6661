"""The lowest blocks of a network, while they are frozen: their outputs taken out once, and put in their place later.

The network's own forward does everything else (embeddings, masks, position biases, norms between stacks, the head), so
nothing of it is told a second time here. Where a block returns more than hidden states that later blocks need (T5's
position bias), the lowest block of the stack still runs, for that alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from moss_rlhf.errors import MossError
from moss_rlhf.model.anatomy import Block, anatomy_of
from moss_rlhf.model.replay import Args, Forward, Kwargs, first, standing_in


class Prefix:
    """The embeddings and the lowest `blocks` blocks of `network`, the encoder's before the decoder's.

    tops   the highest of them in each stack, whose outputs enter what is above.
    """

    def __init__(self, network: Any, blocks: int) -> None:
        anatomy = anatomy_of(network)
        self.network, self.blocks, self.repeats = network, anatomy.blocks[:blocks], anatomy.repeats
        self.embeddings = anatomy.embeddings
        self.tops: dict[str, Block] = {str(block.stack): block for block in self.blocks}
        self._tails: dict[str, tuple[Any, ...] | None] = {}  # what each stack's blocks return after the hidden states

    @torch.no_grad()
    def states(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{stack: (rows, length, hidden)}: the outputs of the highest frozen blocks, in evaluation mode."""
        found: dict[str, Tensor] = {}
        calls = 0

        def keep(block: Block, run: Forward, args: Args, kwargs: Kwargs) -> Any:
            nonlocal calls
            output = run(*args, **kwargs)
            found[block.stack] = first(output)
            self._tails[block.stack] = output[1:] if isinstance(output, tuple) else None
            calls += block is self.blocks[-1]
            if calls == self.repeats:
                raise _Enough
            return output

        self.network.eval()
        with standing_in(tuple(self.tops.values()), keep), suppress(_Enough):
            self.network(**inputs)
        return found

    @contextmanager
    def answering(self, states: Mapping[str, Tensor]) -> Iterator[None]:
        """The frozen blocks answer with `states`, as `self.states` of the same batch gave them.

        `self.states` must have run once: it sees what the blocks return.
        raises   MossError where a block is called with a batch of another shape.
        """
        whole: dict[str, Any] = {}

        def answer(block: Block, run: Forward, args: Args, kwargs: Kwargs) -> Any:
            entering, state = args[0] if args else kwargs["hidden_states"], states[block.stack]
            if entering.shape != state.shape:
                raise MossError(f"{block.name} is given {tuple(entering.shape)}; stored is {tuple(state.shape)}")
            if block.stack not in whole:
                whole[block.stack] = self._like(block, state, run, args, kwargs)
            return whole[block.stack]

        with standing_in(self.blocks, answer):
            yield

    def _like(self, block: Block, state: Tensor, run: Forward, args: Args, kwargs: Kwargs) -> Any:
        """`state` as the block would return it."""
        if block.stack not in self._tails:
            raise MossError("Prefix.states has not run yet")
        tail = self._tails[block.stack]
        if tail is None or all(part is None for part in tail):
            return state if tail is None else (state, *tail)
        with torch.no_grad():
            return (state, *run(*args, **kwargs)[1:])

    def fingerprint(self) -> str:
        """64 hexadecimal digits over all that decides the states but the rows: weights, config, device, autocast."""
        sums = hashlib.sha256()
        parts = [parameter for block in self.blocks for parameter in block.module.parameters()]
        for parameter in [*(parameter for _, parameter in self.embeddings), *parts]:
            sums.update(str(tuple(parameter.shape)).encode())
            sums.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        config = self.network.config.to_dict() | {"id2label": None, "label2id": None}
        sums.update(json.dumps([config, len(self.blocks)], sort_keys=True, default=str).encode())
        sums.update(str(next(self.network.parameters()).device.type).encode())
        return sums.hexdigest()


class _Enough(Exception):  # noqa: N818  # no error
    """All frozen blocks have run."""
