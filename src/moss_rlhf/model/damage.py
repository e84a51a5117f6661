"""What compressing has cost each block, kept beside the table of `sensitivity`. Pure arithmetic on mappings, no torch.

The table (`model.sensitivity`) is {"network": digest of what it was measured on, "matrices": {name: curves}, "blocks":
{name: curves and unit scores}, "damage": {name: loss}}. A stage that changes the network spends from it: what it takes
away is added to the block's damage, in units of the task's loss, and the table is cut down to the blocks and units that
survive; the matrices, which have other weights now, leave it. What stays are scores of the network before: the digest
no longer fits, so who needs exact ones measures anew. A stage may find damage without a table; it stands alone then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from moss_rlhf.errors import ModelError

Table = Mapping[str, Any]
UNITS = ("heads", "cross_heads", "feed_forward")
_USUAL = "0.5"  # the share at which blocks are compared where nothing was done to them yet


def block_damage(source: Table | None) -> dict[str, float]:
    """{block name: damage}, of the blocks that the network has now, the first in the network first.

    What compressing cost each block so far, in units of the task's loss; where nothing was compressed since the table
    was measured, what removing half of the block's weights would cost.
    source   `model.sensitivity`, or the facts of a compressing stage that hold "damage".
    raises   ModelError where neither damage nor a table is known.
    """
    if source and source.get("damage"):
        return {name: float(value) for name, value in source["damage"].items()}
    blocks = (source or {}).get("blocks") or {}
    if not blocks or not all("prune" in scores for scores in blocks.values()):
        raise ModelError(
            "damage: it isn't known what compressing cost each block. Put a sensitivity stage before the first "
            "compressing one, or narrow with score fisher."
        )
    return {name: float(scores["prune"][_USUAL]) for name, scores in blocks.items()}


@dataclass(frozen=True)
class Kept:
    """What stays of one block: positions of its units, by their kind (see UNITS), and the loss that went with the rest.

    A kind that was not touched may be left out.
    """

    units: Mapping[str, Sequence[int]]
    lost: float = 0.0


def after_narrowing(table: Table | None, kept: Mapping[str, Kept]) -> dict[str, Any]:
    """The table with the surviving units alone; `kept` by the name of every block of the network."""
    blocks = {name: _with_units(scores, kept[name].units) for name, scores in _blocks(table).items()}
    return _changed(table, blocks, {name: found.lost for name, found in kept.items()})


def _with_units(scores: Mapping[str, Any], kept: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    units = {kind: [scores[kind][index] for index in kept[kind]] for kind in UNITS if kind in scores and kind in kept}
    return {**scores, **units}


def after_shortening(table: Table | None, survivors: Mapping[str, Sequence[str]]) -> dict[str, Any] | None:
    """The table with the surviving blocks alone, under their new names; None where there is none.

    survivors   {new name: old names, the first the block whose place and scores it takes, then those it must make up
                for}: what all units of these were worth is its damage now.
    """
    if not table:
        return None
    old, damage = _blocks(table), table.get("damage") or {}
    blocks = {new: old[names[0]] for new, names in survivors.items() if names[0] in old}
    carried = {new: sum(damage.get(name, 0.0) for name in names) for new, names in survivors.items()}
    lost = {new: sum(_worth(old.get(name, {})) for name in names[1:]) for new, names in survivors.items()}
    return _changed({**table, "damage": carried}, blocks, lost)


def _worth(scores: Mapping[str, Any]) -> float:
    return float(sum(sum(scores.get(kind, ())) for kind in UNITS))


def after_pruning(table: Table | None, shares: Mapping[str, float]) -> dict[str, Any] | None:
    """The table with the damage of pruning blocks to their shares in [0, 1); as it was where it has no curves."""
    return _spent(table, {name: _at(scores["prune"], shares.get(name, 0.0)) for name, scores in _blocks(table).items()})


def after_rounding(table: Table | None, bits: int) -> dict[str, Any] | None:
    """The table with the damage of rounding every block to so many bits; as it was where it has no curves."""
    return _spent(table, {name: float(scores["bits"][str(bits)]) for name, scores in _blocks(table).items()})


def _spent(table: Table | None, lost: Mapping[str, float]) -> dict[str, Any] | None:
    if not table:
        return None
    return _changed(table, _blocks(table), lost) if lost else dict(table)


def _at(curve: Mapping[str, float], share: float) -> float:
    """The curve's value at a share, straight lines between its points and from (0, 0)."""
    points = [(0.0, 0.0), *sorted((float(level), float(damage)) for level, damage in curve.items())]
    for (low, below), (high, above) in pairwise(points):
        if share <= high:
            return below + (above - below) * (share - low) / (high - low)
    return points[-1][1]


def _blocks(table: Table | None) -> Mapping[str, Any]:
    return (table or {}).get("blocks") or {}


def _changed(table: Table | None, blocks: Mapping[str, Any], lost: Mapping[str, float]) -> dict[str, Any]:
    """The table with other blocks, and what was lost added to their damage."""
    before = (table or {}).get("damage") or {}
    damage = {name: float(before.get(name, 0.0)) + float(loss) for name, loss in lost.items()}
    rest = {name: value for name, value in (table or {}).items() if name not in ("matrices", "blocks")}
    return rest | ({"blocks": dict(blocks)} if blocks else {}) | {"damage": damage}
