"""Which tokens of a long text are kept, against places worked by hand."""

import numpy as np
import pytest

from moss_rlhf.errors import ModelError
from moss_rlhf.model.cutting import Cut, kept_places, pool_windows


def _kept(length, room, keep):
    return [places.tolist() for places in kept_places(length, room, keep)]


def test_head_and_tail_by_hand():
    assert _kept(10, 4, "head") == [[0, 1, 2, 3]]
    assert _kept(10, 4, "tail") == [[6, 7, 8, 9]]
    assert _kept(10, 4, "head+tail") == [[0, 7, 8, 9]]
    assert _kept(10, 6, "head+tail") == [[0, 1, 6, 7, 8, 9]]  # a quarter is rounded up
    assert _kept(10, 1, "head+tail") == [[0]]


def test_the_published_split_of_510():
    """128 of the head and 382 of the tail (Sun et al. 2019, §5.3.1)."""
    (places,) = _kept(1000, 510, "head+tail")
    assert places == [*range(128), *range(1000 - 382, 1000)]


def test_windows_overlap_by_a_quarter_and_the_last_ends_with_the_text():
    # room 8: a step of 6
    assert _kept(20, 8, "windows") == [[*range(8)], [*range(6, 14)], [*range(12, 20)]]
    assert _kept(15, 8, "windows") == [[*range(8)], [*range(6, 14)], [*range(7, 15)]]
    assert _kept(9, 8, "windows") == [[*range(8)], [*range(1, 9)]]
    assert _kept(3, 1, "windows") == [[0], [1], [2]]


@pytest.mark.parametrize("keep", ["head", "tail", "head+tail", "windows"])
def test_a_text_that_fits_is_kept_whole(keep):
    assert _kept(4, 4, keep) == [[0, 1, 2, 3]]
    assert [row.tolist() for row in Cut(keep, 6).rows([1, 0, 0, 0, 0, 1])] == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("length", range(9, 60, 7))
def test_windows_hold_every_token(length):
    windows = _kept(length, 8, "windows")
    assert {place for window in windows for place in window} == set(range(length))
    assert all(len(window) == 8 for window in windows)


def test_special_tokens_stand_around_what_is_kept():
    special = [1, *[0] * 10, 1]
    assert [row.tolist() for row in Cut("tail", 5).rows(special)] == [[0, 8, 9, 10, 11]]
    assert [row.tolist() for row in Cut("head+tail", 6).rows(special)] == [[0, 1, 8, 9, 10, 11]]
    assert [row.tolist() for row in Cut("tail", 4).rows([*[0] * 9, 1])] == [[6, 7, 8, 9]]  # T5: none in front
    assert [row.tolist() for row in Cut("tail", 4).rows([0] * 9)] == [[5, 6, 7, 8]]  # GPT-2: none at all
    with pytest.raises(ValueError, match="no room beside 2 special tokens"):
        Cut("tail", 2).rows(special)


def test_windows_are_pooled_by_their_mean_in_the_texts_order():
    logits = np.array([[1, 2], [3, 0], [5, 5], [2, 4]], dtype=np.float32)
    pooled = pool_windows(logits, np.array([7, 3, 7, 3]))
    assert pooled.tolist() == [[2.5, 2.0], [3.0, 3.5]]
    assert pooled.dtype == np.float32


def test_what_is_declared_is_read_back_and_nonsense_is_refused():
    cut = Cut("head+tail", 128)
    assert Cut.read(cut.declared(), "here") == cut
    assert Cut.read(None, "here") is None
    for declared in ({"keep": "middle", "max_length": 8}, {"keep": "head"}, {"keep": "head", "max_length": 0}):
        with pytest.raises(ModelError, match=r"config\.json declares the cut"):
            Cut.read(declared, "here")
