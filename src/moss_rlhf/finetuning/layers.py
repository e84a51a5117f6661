"""The hierarchy of layers: which parameters form a group, and its rate."""

from __future__ import annotations

from collections.abc import Sequence
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


_UNDAMAGED = 0.5  # ε: the rates of two blocks differ by no more than (ε + 1) / ε, a factor of three


def damage_multipliers(damage: Sequence[float]) -> list[float]:
    """How fast each group learns after compression: damaged blocks faster.

    Of block b, (ε + damage_b / max damage) / mean over the blocks of the same, with ε = 0.5: the blocks' mean rate
    stays as it was. The embeddings learn as a block without damage would, the head at the full rate.

    damage    one a block, ≥ 0.
    returns   blocks + 2 multipliers: embeddings first, head last.
    """
    highest = max(damage, default=0.0) or 1.0
    raised = [_UNDAMAGED + each / highest for each in damage]
    mean = sum(raised) / max(1, len(raised)) or 1.0
    return [_UNDAMAGED / mean, *(each / mean for each in raised), 1.0]


def damage_order(damage: Sequence[float]) -> tuple[int, ...]:
    """The groups in the order in which they thaw: the head, the blocks from the most damaged, the embeddings.

    damage    one a block; of equal ones the upper first.
    """
    blocks = sorted(range(len(damage)), key=lambda block: (-damage[block], -block))
    return (len(damage) + 1, *(block + 1 for block in blocks), 0)


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


def modules_of_groups(network: Any) -> list[tuple[str, nn.Module]]:
    """(name of a group, module) in an order in which each settles what the one before said of its parts.

    What stands beside the blocks (T5's dropout around its stacks, BART's on the embeddings) goes with the embeddings:
    while they are frozen and in evaluation mode, what enters the lowest block that trains is a fixed function of the
    text.
    """
    anatomy, base = anatomy_of(network), network.base_model
    inside = dict(base.named_modules())
    above = [("head", inside[part]) for part in anatomy.family.above if part in inside]
    blocks = [(block.name, block.module) for block in anatomy.blocks]
    return [("head", network), ("embeddings", base), *blocks, *above]
