"""The order of rows: a permutation, in batches of one length, a pure function of seed and epoch."""

import numpy as np
import pytest

from moss_rlhf.finetuning.sampling import EpochSampler, bucketed_order

LENGTHS = np.random.default_rng(3).integers(1, 400, size=1013).tolist()
BATCH = 7


@pytest.mark.parametrize("bucketing", [True, False])
def test_every_epoch_is_another_permutation(bucketing):
    sampler = EpochSampler(LENGTHS, BATCH, seed=5, bucketing=bucketing)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(len(LENGTHS)))
    assert orders[0] != orders[1]
    assert len(sampler) == len(LENGTHS)


@pytest.mark.parametrize("bucketing", [True, False])
def test_order_depends_on_seed_and_epoch_alone(bucketing):
    def order(seed, epochs):
        sampler = EpochSampler(LENGTHS, BATCH, seed, bucketing)
        for epoch in epochs:
            sampler.set_epoch(epoch)
            result = list(sampler)
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
