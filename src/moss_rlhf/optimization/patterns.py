"""Which weights of a matrix may become zero together: any, n of every m, or whole blocks. Pure functions of scores.

The lowest scores go. Ties go by position: the earlier one goes first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Unstructured where both are None.

    keep    (n, m): n of every m neighbours along the input stay, such as 2 of 4.
    block   (rows, columns) that go or stay as one.
    """

    keep: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    @property
    def sparsity(self) -> float | None:
        """What an n:m pattern says by itself."""
        return None if self.keep is None else 1 - self.keep[0] / self.keep[1]


def parse_pattern(text: str) -> Pattern:
    """'unstructured', n:m such as '2:4' (2 of 4 stay), or rows x columns such as '4x1'; ValueError on anything else."""
    if text == "unstructured":
        return Pattern()
    found = re.fullmatch(r"(\d+)([:x])(\d+)", text)
    first, last = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == ":" and 0 < first < last:
        return Pattern(keep=(first, last))
    if found and found[2] == "x" and first and last:
        return Pattern(block=(first, last))
    raise ValueError(f"pattern must be unstructured, n:m with n < m such as 2:4, or a block such as 4x1, got {text!r}")


def check_sparsity(sparsity: float) -> None:
    """ValueError outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def lowest_of_rows(score: Tensor, sparsity: float) -> Tensor:
    """True for the lowest share of each row, rounded down to whole weights. score (out, in); returns bool, (out, in)."""
    check_sparsity(sparsity)
    lowest = score.argsort(dim=1, stable=True)[:, : int(score.shape[1] * sparsity + 1e-9)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, lowest, True)


def lowest_of_matrix(score: Tensor, sparsity: float) -> Tensor:
    """True for the lowest share of the whole matrix, rounded down to whole weights. score of any shape."""
    check_sparsity(sparsity)
    flat = score.flatten()
    lowest = flat.argsort(stable=True)[: int(flat.numel() * sparsity + 1e-9)]
    return torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, lowest, True).reshape(score.shape)


def all_but_highest(score: Tensor, kept: int, of: int) -> Tensor:
    """True for all but the `kept` highest scores of every `of` neighbours in a row. score (out, in).

    raises   ValueError where rows are no multiple of `of`.
    """
    if score.shape[1] % of:
        raise ValueError(f"a pattern {kept}:{of} needs rows of a multiple of {of} weights, got {score.shape[1]}")
    groups = score.unflatten(1, (-1, of))
    lowest = groups.argsort(dim=2, stable=True)[:, :, : of - kept]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).flatten(1)


def lowest_blocks(score: Tensor, sparsity: float, block: tuple[int, int]) -> Tensor:
    """True for the blocks of lowest summed score, rounded down to whole blocks. score (out, in).

    raises   ValueError where the blocks do not tile the matrix.
    """
    rows, columns = block
    if score.shape[0] % rows or score.shape[1] % columns:
        raise ValueError(f"blocks of {rows}x{columns} do not tile a matrix of {score.shape[0]}x{score.shape[1]}")
    sums = score.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum(dim=(1, 3))
    mask = lowest_of_matrix(sums, sparsity)
    return mask.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def pattern_mask(score: Tensor, pattern: Pattern, sparsity: float, *, by_row: bool) -> Tensor:
    """The mask of one matrix in its pattern; `sparsity` counts where the pattern doesn't say it. score (out, in)."""
    if pattern.keep is not None:
        return all_but_highest(score, *pattern.keep)
    if pattern.block is not None:
        return lowest_blocks(score, sparsity, pattern.block)
    return lowest_of_rows(score, sparsity) if by_row else lowest_of_matrix(score, sparsity)
