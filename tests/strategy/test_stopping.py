import math
from functools import reduce

from moss_rlhf.strategy import Best


def best_of(*evaluations):
    """evaluations (metric, loss), the first at step 10, the next at 20 …"""
    steps = enumerate(evaluations, 1)
    return reduce(lambda best, entry: best.after(*entry[1], step=10 * entry[0]), steps, Best())


def test_the_highest_metric_wins_and_patience_counts_from_it():
    assert best_of((0.5, 1.0), (0.8, 0.9), (0.7, 0.1), (0.6, 0.2)) == Best(0.8, 0.9, step=20, waited=2)


def test_a_tie_goes_to_the_lower_loss_then_to_the_earlier():
    assert best_of((0.8, 0.9), (0.8, 0.5)).step == 20
    assert best_of((0.8, 0.5), (0.8, 0.9)) == Best(0.8, 0.5, step=10, waited=1)
    assert best_of((0.8, 0.5), (0.8, 0.5)) == Best(0.8, 0.5, step=10, waited=1)


def test_a_better_one_resets_the_wait():
    assert best_of((0.5, 1.0), (0.4, 1.0), (0.3, 1.0), (0.6, 1.0)).waited == 0


def test_the_first_evaluation_counts_however_bad():
    assert best_of((0.0, 1e9)).step == 10
    assert best_of((-5.0, 1e9)).step == 10


def test_nan_never_wins():
    assert best_of((0.5, 1.0), (math.nan, 0.1)) == Best(0.5, 1.0, step=10, waited=1)
    assert best_of((0.5, 1.0), (0.5, math.nan)) == Best(0.5, 1.0, step=10, waited=1)
