import pytest
import torch

from moss_rlhf.optimization.patterns import (
    all_but_highest,
    lowest_blocks,
    lowest_of_all,
    lowest_of_matrix,
    lowest_of_rows,
    pattern_mask,
)
from moss_rlhf.recipe.pattern import Pattern, parse_pattern

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHARES = [0.0, 0.01, 0.29, 0.5, 0.75, 0.999]


def scores(rows, columns, dtype=torch.float32, seed=0):
    """Random, with many ties: a third are of the few values 0, 0.25, 0.5, 0.75."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(rows, columns, generator=generator)
    tied = torch.rand(rows, columns, generator=generator) < 0.33
    return torch.where(tied, (score * 4).floor() / 4, score).to(dtype)


def by_sorting(groups, removed):
    """(groups, m) bool, one group after the other in Python's own stable sort."""
    mask = torch.zeros(groups.shape, dtype=torch.bool)
    for place, group in enumerate(groups.tolist()):
        mask[place, sorted(range(len(group)), key=group.__getitem__)[:removed]] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("rows", "columns"), [(7, 131), (1, 1), (13, 100)])
def test_the_lowest_are_those_of_a_stable_sort(rows, columns, share, dtype):
    score = scores(rows, columns, dtype)
    kept = score.clone()
    removed = int(columns * share + 1e-9)
    assert torch.equal(lowest_of_rows(score, share), by_sorting(score, removed))
    flat = by_sorting(score.reshape(1, -1), int(rows * columns * share + 1e-9))
    assert torch.equal(lowest_of_matrix(score, share), flat.reshape(score.shape))
    assert torch.equal(score, kept)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_of_several_matrices_the_lowest_are_those_of_a_stable_sort_of_all(share):
    several = [scores(5, 31, seed=1), scores(3, 7, seed=2), scores(11, 13, seed=3).T]
    joined = torch.cat([score.flatten() for score in several])
    removed = int(len(joined) * share)
    masks = lowest_of_all(several, removed)
    assert torch.equal(torch.cat([mask.flatten() for mask in masks]), by_sorting(joined[None], removed)[0])
    assert [mask.shape for mask in masks] == [score.shape for score in several]


def test_numbers_that_differ_in_their_last_bit_only_are_told_apart():
    for dtype, step in ((torch.float32, 2**-23), (torch.float64, 2**-52)):
        score = 1 + step * torch.tensor([[3.0, 1.0, 0.0, 2.0]], dtype=dtype)
        assert lowest_of_matrix(score, 0.5).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 12), (16, 32)])
def test_n_of_m_is_a_stable_sort_of_each_group(kept, of):
    score = scores(11, 3 * of)
    mask = all_but_highest(score, kept, of)
    assert torch.equal(mask, by_sorting(score.reshape(-1, of), of - kept).reshape(mask.shape))
    assert torch.equal(all_but_highest(score.T.contiguous().T, kept, of), mask)  # whatever the layout in memory


def test_n_of_m_by_hand():
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0]])
    assert all_but_highest(score, 2, 4).int().tolist() == [[0, 1, 0, 1, 1, 1, 0, 0]]


def test_blocks_by_hand():
    score = torch.tensor([[1.0, 1, 9, 0], [1, 1, 0, 0], [2, 2, 0, 1], [2, 2, 1, 0]])  # sums 4, 9, 8, 2
    assert lowest_blocks(score, 0.5, (2, 2)).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert lowest_blocks(score, 0.49, (2, 2)).int().tolist() == [[0, 0, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    assert lowest_blocks(score, 0.5, (4, 1)).int().tolist() == [[1, 0, 0, 1]] * 4  # sums 6, 6, 10, 1
    assert lowest_blocks(score, 0.25, (1, 4)).int().tolist() == [[0] * 4, [1] * 4, [0] * 4, [0] * 4]


@pytest.mark.parametrize("block", [(3, 5), (1, 7), (13, 1)])
def test_blocks_go_whole_and_none_kept_is_lower(block):
    rows, columns = 3 * 13, 5 * 7
    score = scores(rows, columns)
    tiles = lowest_blocks(score, 0.4, block).reshape(rows // block[0], block[0], columns // block[1], block[1])
    gone = tiles.all(dim=3).all(dim=1)
    assert torch.equal(gone, tiles.any(dim=3).any(dim=1))
    assert int(gone.sum()) == int(0.4 * gone.numel())
    sums = score.reshape(tiles.shape).sum(dim=(1, 3))
    assert sums[gone].max() <= sums[~gone].min()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", Pattern()),
        ("2:4", Pattern(keep=(2, 4))),
        ("4:8", Pattern(keep=(4, 8))),
        ("4x1", Pattern(block=(4, 1))),
        ("16x16", Pattern(block=(16, 16))),
    ],
)
def test_patterns_by_name(text, pattern):
    assert parse_pattern(text) == pattern
    assert pattern.sparsity == (0.5 if pattern.keep else None)


@pytest.mark.parametrize("text", ["", "4:4", "0:4", "4:2", "0x4", "4x", "2:4:8", "structured", "-1:4", "1.5x2"])
def test_no_pattern(text):
    with pytest.raises(ValueError, match="pattern must be unstructured, n:m with n < m such as 2:4"):
        parse_pattern(text)


def test_a_pattern_picks_its_mask():
    score = scores(8, 16)
    assert torch.equal(pattern_mask(score, Pattern(), 0.3, by_row=True), lowest_of_rows(score, 0.3))
    assert torch.equal(pattern_mask(score, Pattern(), 0.3, by_row=False), lowest_of_matrix(score, 0.3))
    assert torch.equal(pattern_mask(score, Pattern(keep=(1, 4)), 0.3, by_row=True), all_but_highest(score, 1, 4))
    blocks = pattern_mask(score, Pattern(block=(2, 4)), 0.3, by_row=True)
    assert torch.equal(blocks, lowest_blocks(score, 0.3, (2, 4)))


def test_what_does_not_fit():
    score = torch.rand(6, 10)
    with pytest.raises(ValueError, match="2:4 needs rows of a multiple of 4 weights, got 10"):
        all_but_highest(score, 2, 4)
    with pytest.raises(ValueError, match="at least 1 and fewer than m of every m weights, got 0:5"):
        all_but_highest(score, 0, 5)
    with pytest.raises(ValueError, match="blocks of 4x5 do not tile a matrix of 6x10"):
        lowest_blocks(score, 0.5, (4, 5))
    for choose in (lowest_of_rows, lowest_of_matrix):
        for share in (1, -0.1, float("nan")):
            with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
                choose(score, share)
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
        lowest_blocks(score, 1.0, (2, 5))
