"""Zeros that stay: the mask of a pruned parameter is its exact zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moss_rlhf.errors import MossError


@dataclass(frozen=True)
class Zeros:
    """The zeros of pruned parameters as they stood at one moment, to be put back after every step of an optimizer."""

    parameters: tuple[nn.Parameter, ...]
    kept: tuple[Tensor, ...]  # bool, True where a weight may live

    @classmethod
    def of(cls, pruned: Sequence[nn.Parameter]) -> Zeros:
        return cls(tuple(pruned), tuple(parameter.detach() != 0 for parameter in pruned))

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            parameter.mul_(kept.to(parameter.device))

    def verify(self) -> None:
        """MossError where a zero has come alive: training must never undo pruning."""
        for parameter, kept in zip(self.parameters, self.kept, strict=True):
            if bool((parameter.detach().cpu() != 0)[~kept.cpu()].any()):
                raise MossError("a pruned weight came alive in training; this is a fault of moss-rlhf")
