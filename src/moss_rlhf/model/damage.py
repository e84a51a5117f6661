"""What compression costs each block, out of a table that `sensitivity` measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEVEL = "0.5"  # sparsity


def block_damage(table: Mapping[str, Any]) -> dict[str, float]:
    """The rise of the task's loss, to second order, where half of a block's weights are pruned; by block name.

    table   {"blocks": {name: {"prune": {sparsity: damage}}}}, as `model.sensitivity` holds it.
    """
    return {name: float(scores["prune"][_LEVEL]) for name, scores in table["blocks"].items()}
