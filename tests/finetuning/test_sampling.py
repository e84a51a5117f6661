"""The order of rows: a permutation, in batches of one length, a pure function of seed and epoch."""

import itertools

import numpy as np
import pytest

from moss_rlhf.finetuning.sampling import bucketed_order, budgeted_sizes, epoch_batches

LENGTHS = np.random.default_rng(3).integers(1, 400, size=1013).tolist()
BATCH = 7


WAYS = [{"bucketing": True}, {"bucketing": False}, {"bucketing": True, "tokens": 2000}]


@pytest.mark.parametrize("way", WAYS, ids=["bucketed", "random", "budgeted"])
def test_every_epoch_is_another_permutation(way):
    batches = epoch_batches(LENGTHS, BATCH, 5, **way)
    orders = []
    for epoch in (0, 1):
        batches.set_epoch(epoch)
        orders.append(list(batches))
        assert sorted(itertools.chain(*orders[-1])) == list(range(len(LENGTHS)))
        assert len(orders[-1]) == len(batches)
    assert orders[0] != orders[1]
    assert batches.rows == len(LENGTHS)


@pytest.mark.parametrize("way", WAYS, ids=["bucketed", "random", "budgeted"])
def test_order_depends_on_seed_and_epoch_alone(way):
    def order(seed, epochs):
        batches = epoch_batches(LENGTHS, BATCH, seed, **way)
        for epoch in epochs:
            batches.set_epoch(epoch)
            result = list(batches)
        return result

    assert order(5, [0, 1, 2]) == order(5, [2])
    assert order(5, [2]) != order(6, [2])


def test_batches_hold_similar_lengths_and_the_short_one_comes_last():
    order = bucketed_order(LENGTHS, BATCH, seed=0, epoch=0)
    full = np.asarray(LENGTHS)[order[: len(order) // BATCH * BATCH]].reshape(-1, BATCH)
    spread = (full.max(axis=1) - full.min(axis=1)).mean()
    assert len(order) % BATCH == 5  # what remains is at the end, or Trainer's batches would straddle ours
    assert spread < 400 / 10, spread  # random batches of 7 spread over 300
    assert full.mean(axis=1).std() > 50  # and short and long batches are mixed: the order itself is not sorted
    assert np.any(np.diff(full.mean(axis=1)) < 0)


def test_fewer_rows_than_a_batch():
    assert sorted(bucketed_order([3, 1, 2], 8, seed=0, epoch=0).tolist()) == [0, 1, 2]


def test_budgeted_sizes_by_hand():
    # sorted 1 2 2 3 5 9: 4 x 3 = 12 fits, a fifth row of 5 would make 25; then 5 and 9 alone, 2 x 9 being too many
    assert budgeted_sizes([3, 2, 9, 1, 5, 2], 12) == [4, 1, 1]
    assert budgeted_sizes([20, 20], 12) == [1, 1]  # longer than the budget: alone


def test_batches_stay_within_their_budget_and_hold_rows_of_similar_lengths():
    batches = epoch_batches(LENGTHS, BATCH, 0, bucketing=True, tokens=2000)
    lengths = [np.asarray(LENGTHS)[batch] for batch in batches]
    assert max(len(batch) * batch.max() for batch in lengths) <= 2000
    padding = 1 - sum(LENGTHS) / sum(len(batch) * batch.max() for batch in lengths)
    assert padding < 0.12, padding  # random batches of this many rows are half padding
