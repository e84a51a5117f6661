"""The hierarchy of layers: which parameters form a group, and its rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moss_rlhf.model.anatomy import anatomy_of

if TYPE_CHECKING:
    from torch import nn


def layer_learning_rates(depth: int, learning_rate: float, decay: float) -> list[float]:
    """Discriminative rates: the head's is `learning_rate`, each group's below is that of the next above × `decay`.

    depth     number of blocks.
    returns   depth + 2 rates: embeddings first, then the blocks from the lowest, head last
              (Howard & Ruder 2018, arXiv:1801.06146, §3.2, a rate a layer).
    raises    ValueError where depth < 0 or decay is outside (0, 1].
    """
    if depth < 0 or not 0 < decay <= 1:
        raise ValueError(f"depth must be >= 0 and decay in (0, 1], got {depth} and {decay}")
    return [learning_rate * decay ** (depth + 1 - level) for level in range(depth + 2)]


@dataclass(frozen=True)
class LayerGroup:
    """Parameters that train together: 'embeddings', 'block.0' …, 'head'."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]

    def train(self, trains: bool) -> None:
        for _, parameter in self.parameters:
            parameter.requires_grad_(trains)


def layer_groups(network: Any) -> list[LayerGroup]:
    """The groups of a network, embeddings first, head last; every parameter is in exactly one."""
    anatomy = anatomy_of(network)
    blocks = [LayerGroup(block.name, tuple(block.module.named_parameters())) for block in anatomy.blocks]
    return [LayerGroup("embeddings", anatomy.embeddings), *blocks, LayerGroup("head", anatomy.head)]
