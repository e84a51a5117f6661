from itertools import combinations, product

import numpy as np
import pytest
import torch

from moss_rlhf.optimization.width_allocation import cheapest_widths, keep_highest, losses_of, rearrange, widths_of


def test_the_highest_are_kept_in_their_order_and_ties_go_to_the_lower_index():
    assert keep_highest(torch.tensor([0.1, 5.0, 0.2, 3.0]), 2).tolist() == [1, 3]
    assert keep_highest(torch.tensor([2.0, 1.0, 2.0, 2.0]), 2).tolist() == [0, 2]
    assert keep_highest(torch.zeros(3), 3).tolist() == [0, 1, 2]


def test_widths_are_multiples_and_the_whole_and_never_none():
    assert widths_of(4) == [1, 2, 3, 4]
    assert widths_of(20, 8) == [8, 16, 20]
    assert widths_of(16, 8) == [8, 16]
    assert widths_of(5, 8) == [5]


def test_what_goes_are_the_lowest_scores():
    assert losses_of(torch.tensor([4.0, 1.0, 2.0]), [1, 2, 3]).tolist() == [3.0, 1.0, 0.0]


def every_choice(losses, costs, budget):
    """By trying all of them."""
    choices = product(*(range(len(loss)) for loss in losses))
    fitting = [c for c in choices if sum(cost[i] for cost, i in zip(costs, c, strict=True)) <= budget]
    return min(sum(loss[i] for loss, i in zip(losses, c, strict=True)) for c in fitting)


@pytest.mark.parametrize("seed", range(8))
def test_the_knapsack_is_as_good_as_trying_everything(seed):
    draw = np.random.default_rng(seed)
    losses = [draw.random(size) for size in (3, 5, 2, 4)]
    costs = [draw.integers(1, 20, size).astype(float) for size in (3, 5, 2, 4)]
    budget = sum(cost.min() for cost in costs) + 16.0  # steps of 1/512: no cost is rounded
    picks = cheapest_widths(losses, costs, budget)
    assert sum(cost[pick] for cost, pick in zip(costs, picks, strict=True)) <= budget
    found = sum(loss[pick] for loss, pick in zip(losses, picks, strict=True))
    assert found == pytest.approx(every_choice(losses, costs, budget), abs=1e-12)


def test_a_budget_for_everything_keeps_everything_and_one_for_too_little_is_refused():
    losses, costs = [np.array([2.0, 1.0, 0.0])] * 2, [np.array([1.0, 2.0, 3.0])] * 2
    assert cheapest_widths(losses, costs, 6.0) == [2, 2]
    assert cheapest_widths(losses, costs, 2.0) == [0, 0]
    with pytest.raises(ValueError, match="the smallest widths cost 2, above the budget of 1"):
        cheapest_widths(losses, costs, 1.0)


def test_units_that_repeat_each_other_are_not_both_removed():
    # units 0 and 1 say the same: each alone costs 1, both together 4; unit 2 alone costs 1.21
    gradients = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.1, 0.0], [0.0, 0.0, 0.0, 9.0]])
    start = keep_highest(gradients.square().sum(dim=0), 2)
    assert start.tolist() == [2, 3]
    assert rearrange(gradients, start).tolist() in ([0, 3], [1, 3])


def test_swaps_reach_what_no_swap_betters():
    gradients = torch.randn(6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def cost(kept):
        removed = [unit for unit in range(9) if unit not in kept]
        return float(gradients[:, removed].sum(dim=1).square().sum())

    start = keep_highest(gradients.square().sum(dim=0), 4)
    kept = rearrange(gradients, start).tolist()
    assert len(set(kept)) == 4
    assert cost(kept) < cost(start.tolist())
    neighbours = [other for other in combinations(range(9), 4) if len(set(other) & set(kept)) == 3]
    assert min(cost(other) for other in neighbours) >= cost(kept) - 1e-9
    assert rearrange(gradients, torch.arange(9)).tolist() == list(range(9))
