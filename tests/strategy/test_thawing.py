"""Which frozen stretches are worth a cache: by hand."""

from moss_rlhf.strategy import Run, cached_runs, frozen_blocks, lowest_trained


def test_frozen_blocks():
    assert frozen_blocks([True, True, True, True]) == 0
    assert frozen_blocks([False, True, True, True]) == 0  # the embeddings alone
    assert frozen_blocks([False, False, True, False]) == 1
    assert frozen_blocks([False, False, False, True]) == 2


def test_one_run_serves_two_phases():
    # an epoch (10 steps) of the head over 6 blocks, one of two blocks more, two of all: neither alone lasts two epochs
    frozen = [6] * 10 + [4] * 10 + [0] * 20
    assert cached_runs(frozen, 10, 2) == [Run(0, 20, 4)]
    assert cached_runs(frozen, 10, 3) == []


def test_the_larger_saving_wins():
    # apart (3 - 1) * 6 + (2 - 1) * 1 = 13 forward passes of a block are saved, together (5 - 1) * 1 = 4
    assert cached_runs([6] * 30 + [1] * 20, 10, 2) == [Run(0, 30, 6), Run(30, 50, 1)]
    # apart 6 + 5 = 11, together (4 - 1) * 5 = 15: a second filling costs more than a lower cut
    assert cached_runs([6] * 20 + [5] * 20, 10, 2) == [Run(0, 40, 5)]


def test_nothing_frozen_is_nothing_kept():
    assert cached_runs([0] * 50, 10, 1) == []
    assert cached_runs([3] * 5 + [0] * 10 + [3] * 5, 10, 1) == []  # not in a row


def test_a_single_epoch_is_kept_only_where_asked_for():
    assert cached_runs([3] * 10, 10, 2) == []
    assert cached_runs([3] * 10, 10, 1) == [Run(0, 10, 3)]  # for the next trial


def test_gradual_unfreezing_is_cut_where_it_saves_most():
    frozen = [max(0, lowest_trained(step, 120, 5, "gradual") - 1) for step in range(120)]
    assert frozen[:60] == [3] * 15 + [2] * 15 + [1] * 15 + [0] * 15
    # epochs of 6 steps: 3 · 1.5, 2 · 1.5 and 1 · 1.5 apart; 2 · 4 together and 1.5; 1 · 6.5 all together
    assert cached_runs(frozen, 6, 2) == [Run(0, 30, 2), Run(30, 45, 1)]
