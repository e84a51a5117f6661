"""Which weights of a matrix may become zero together: any, n of every m, or whole blocks. Pure functions of scores.

The lowest scores go; scores are finite and not negative. Ties go by position: the earlier one goes first. Nothing is
sorted: what is needed is one threshold, and the ties at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moss_rlhf.recipe.pattern import Pattern

_DIGIT = 16  # bits read at a time: a histogram of 65,536 counts


def check_sparsity(sparsity: float) -> None:
    """ValueError outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def whole(count: int, sparsity: float) -> int:
    """The share of `count` in whole units, rounded down; 0.29 of 100 is 29, although 0.29 · 100 < 29 in floats."""
    return int(count * sparsity + 1e-9)


def lowest_of_rows(score: Tensor, sparsity: float) -> Tensor:
    """True for the lowest share of each row, rounded down to whole weights. score (out, in); returns bool, alike."""
    check_sparsity(sparsity)
    removed = whole(score.shape[1], sparsity)
    if not removed or not score.numel():
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _row_thresholds(score, removed)
    below, ties = score < threshold, score == threshold
    spare = removed - below.sum(dim=1, keepdim=True)
    if (ties.sum(dim=1, keepdim=True) > spare).any():
        ties &= ties.cumsum(dim=1) <= spare
    return below.logical_or_(ties)


def _row_thresholds(score: Tensor, removed: int) -> Tensor:
    """The `removed`-th lowest score of each row, (out, 1), from the shorter side."""
    kept = score.shape[1] - removed
    if removed <= kept:
        return score.topk(removed, dim=1, largest=False, sorted=False).values.amax(dim=1, keepdim=True)
    return score.topk(kept + 1, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def lowest_of_matrix(score: Tensor, sparsity: float) -> Tensor:
    """True for the lowest share of the whole matrix, rounded down to whole weights. score of any shape."""
    check_sparsity(sparsity)
    return lowest_of_all([score], whole(score.numel(), sparsity))[0]


def lowest_of_all(scores: Sequence[Tensor], removed: int) -> list[Tensor]:
    """True for the `removed` lowest of all scores together; ties go by matrix, then by position.

    Two passes of counting (four in float64) find the threshold, so beside the masks there is never more in memory
    than a few copies of one matrix.
    scores    any shapes, one float dtype (a narrower one is read as float32); their magnitudes count.
    removed   0 … the number of scores.
    """
    if removed == 0:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    threshold, ties = _threshold(scores, removed)
    masks = []
    for score in scores:
        keys = _keys(score)
        mask = keys < threshold
        tied = (keys == threshold).nonzero()[:ties, 0]
        masks.append(mask.index_fill_(0, tied, True).reshape(score.shape))
        ties -= len(tied)
    return masks


def _threshold(scores: Sequence[Tensor], removed: int) -> tuple[int, int]:
    """The key of the `removed`-th lowest score, and how many of the scores with that key are among the lowest."""
    threshold = 0
    for shift in range(_bits(scores) - _DIGIT, -1, -_DIGIT):
        counts = torch.stack([_digits(score, threshold, shift) for score in scores]).sum(dim=0).cumsum(dim=0)
        digit = int(torch.searchsorted(counts, removed))
        removed -= int(counts[digit - 1]) if digit else 0
        threshold = (threshold << _DIGIT) + digit
    return threshold, removed


def _digits(score: Tensor, prefix: int, shift: int) -> Tensor:
    """How often each digit follows `prefix` in the keys, (65536,)."""
    upper = _keys(score) >> shift
    if shift + _DIGIT < _bits([score]):
        upper = upper[(upper >> _DIGIT) == prefix] & (2**_DIGIT - 1)
    return torch.bincount(upper, minlength=2**_DIGIT)


def _keys(score: Tensor) -> Tensor:
    """Integers in the order of the magnitudes, flat: the bits of a float without its sign are such."""
    if score.dtype == torch.float64:
        return (score.detach().view(torch.int64) & (2**63 - 1)).flatten()
    return (score.detach().float().view(torch.int32) & (2**31 - 1)).flatten()


def _bits(scores: Sequence[Tensor]) -> int:
    return 64 if scores[0].dtype == torch.float64 else 32


def all_but_highest(score: Tensor, kept: int, of: int) -> Tensor:
    """True for all but the `kept` highest scores of every `of` neighbours in a row. score (out, in).

    raises   ValueError where rows are no multiple of `of`, or not 0 < kept < of.
    """
    check_fit(score.shape, Pattern(keep=(kept, of)))
    groups = score.reshape(len(score), -1, of)
    before = torch.empty_like(groups, dtype=torch.int8 if of < 128 else torch.int32)
    values, ranks = groups.unbind(2), before.unbind(2)
    for later in range(of):  # a tournament, all groups at once: five times as fast as sorting each
        ranks[later].fill_(later)
        for earlier in range(later):
            swapped = (values[later] < values[earlier]).view(torch.int8)
            ranks[earlier].add_(swapped)
            ranks[later].sub_(swapped)
    return (before < of - kept).flatten(1)


def lowest_blocks(score: Tensor, sparsity: float, block: tuple[int, int]) -> Tensor:
    """True for the blocks of lowest summed score, rounded down to whole blocks. score (out, in).

    raises   ValueError where the blocks do not tile the matrix.
    """
    check_sparsity(sparsity)
    return lowest_tiles(score, whole(score.numel() // (block[0] * block[1]), sparsity), block)


def lowest_tiles(score: Tensor, removed: int, block: tuple[int, int]) -> Tensor:
    """As `lowest_blocks`, by the number of blocks."""
    check_fit(score.shape, Pattern(block=block))
    rows, columns = block
    sums = score.reshape(-1, rows, score.shape[1] // columns, columns).sum(dim=(1, 3))
    mask = lowest_of_all([sums], removed)[0]
    return mask.repeat_interleave(rows, dim=0).repeat_interleave(columns, dim=1)


def check_fit(shape: Sequence[int], pattern: Pattern) -> None:
    """ValueError where a matrix (out, in) of this shape can't take the pattern."""
    if pattern.keep is not None:
        kept, of = pattern.keep
        if not 0 < kept < of:
            raise ValueError(f"a pattern n:m keeps at least 1 and fewer than m of every m weights, got {kept}:{of}")
        if shape[1] % of:
            raise ValueError(f"a pattern {kept}:{of} needs rows of a multiple of {of} weights, got {shape[1]}")
    if pattern.block is not None:
        rows, columns = pattern.block
        if rows < 1 or columns < 1 or shape[0] % rows or shape[1] % columns:
            raise ValueError(f"blocks of {rows}x{columns} do not tile a matrix of {shape[0]}x{shape[1]}")


def pattern_mask(score: Tensor, pattern: Pattern, sparsity: float, *, by_row: bool) -> Tensor:
    """The mask of one matrix in its pattern; `sparsity` counts where the pattern doesn't say it. score (out, in)."""
    if pattern.keep is not None:
        return all_but_highest(score, *pattern.keep)
    if pattern.block is not None:
        return lowest_blocks(score, sparsity, pattern.block)
    return lowest_of_rows(score, sparsity) if by_row else lowest_of_matrix(score, sparsity)
