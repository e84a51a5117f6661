"""What goes along with a training: masks that stay, penalties, weights that are rounded or cut while they learn.

A companion is told of every step and may act before the forward pass, around it, and after the optimizer. Each trick is
one class in one file; the trainer knows none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moss_rlhf.model.zeros import Zeros

STATE = "companions.safetensors"


@dataclass(frozen=True)
class Extra:
    """A parameter of a companion's own, which the optimizer moves beside the network's."""

    parameter: nn.Parameter
    learning_rate: float
    weight_decay: float = 0.0


class Companion:
    """Does nothing; a subclass overrides what it needs."""

    name = "companion"
    alters_forward = False  # whether the network computes something else inside `around` than outside of it

    @property
    def settled(self) -> int:
        """The step from which evaluations may win: what is measured before is not yet what was asked for."""
        return 0

    def extras(self) -> Sequence[Extra]:
        """Parameters of its own."""
        return ()

    def before_step(self, step: int) -> None:
        """Before the forward pass of optimizer step `step`, counted from 0."""

    def around(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        """Holds during the forward and the backward pass of one batch, or of a piece of it."""
        return nullcontext()

    def penalty(self) -> Tensor | None:
        """What is added to a batch's loss."""
        return None

    def flops(self, length: int, tokens: int) -> float:
        """Operations of the step that it adds (or, below 0, spares), of a batch of texts of `length` tokens."""
        return 0.0

    def after_step(self, step: int, rates: Sequence[float]) -> None:
        """After the optimizer moved the weights; `rates` are those of the layer groups at this step."""

    def as_shipped(self) -> AbstractContextManager[Any]:
        """The weights as they would be kept if training ended now: for evaluations, and for the best checkpoint."""
        return nullcontext()

    def state(self) -> Mapping[str, Tensor]:
        """What a checkpoint must hold so that a resumed training ends in the same bits."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take `state` back."""

    def leave(self) -> None:
        """The last step is done, or training broke off: take away what was put into the network."""

    def finish(self) -> dict[str, Any]:
        """After the last step, the network holding its best weights: the facts to report."""
        return {}


class KeptZeros(Companion):
    """Pruned weights stay zero."""

    name = "zeros"

    def __init__(self, pruned: Sequence[nn.Parameter]) -> None:
        self.zeros = Zeros.of(pruned)

    def after_step(self, step: int, rates: Sequence[float]) -> None:
        self.zeros.restore()

    def finish(self) -> dict[str, Any]:
        self.zeros.verify()
        return {}


class Companions:
    """All companions of a training, as one."""

    def __init__(self, members: Sequence[Companion]) -> None:
        self.members = tuple(members)

    @property
    def settled(self) -> int:
        return max((member.settled for member in self.members), default=0)

    def extras(self) -> list[Extra]:
        return [extra for member in self.members for extra in member.extras()]

    def before_step(self, step: int) -> None:
        for member in self.members:
            member.before_step(step)

    @contextmanager
    def around(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.around(batch))
            yield

    def penalised(self, loss: Tensor) -> Tensor:
        """The loss and every penalty."""
        penalties = [found for member in self.members if (found := member.penalty()) is not None]
        return torch.stack([loss, *penalties]).sum() if penalties else loss

    def flops(self, length: int, tokens: int) -> float:
        return sum(member.flops(length, tokens) for member in self.members)

    def after_step(self, step: int, rates: Sequence[float]) -> None:
        for member in self.members:
            member.after_step(step, rates)

    @contextmanager
    def as_shipped(self) -> Iterator[None]:
        with ExitStack() as stack:
            for member in self.members:
                stack.enter_context(member.as_shipped())
            yield

    def save(self, folder: Path) -> None:
        state = {
            f"{member.name}.{key}": value.detach().cpu().contiguous()
            for member in self.members
            for key, value in member.state().items()
        }
        if state:
            save_file(state, folder / STATE)

    def load(self, folder: Path) -> None:
        state = load_file(folder / STATE) if (folder / STATE).exists() else {}
        for member in self.members:
            start = f"{member.name}."
            member.restore({key.removeprefix(start): value for key, value in state.items() if key.startswith(start)})

    def leave(self) -> None:
        for member in self.members:
            member.leave()

    def finish(self) -> dict[str, Any]:
        return {key: value for member in self.members for key, value in member.finish().items()}
