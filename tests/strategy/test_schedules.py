import math
import runpy
from pathlib import Path

import pytest

from moss_rlhf.strategy import (
    SCHEDULES,
    constant,
    cosine,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    reductions,
    shaped,
    slanted_triangular,
    warmup_stable_decay,
)

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def test_linear_by_hand():
    # 10 steps, 4 of them warming up, which never begin at 0: 1/5 … 4/5, then 6/6 … 1/6
    expected = [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert [linear(step, 10, 0.4) for step in range(10)] == pytest.approx(expected)
    assert linear(10, 10, 0.4) == 0


def test_constant_by_hand():
    assert [constant(step, 10, 0.3) for step in range(5)] == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 1])


def test_slanted_triangular_by_hand():
    # ULMFiT eq. 3 with T = 20, cut_frac = 0.1, ratio = 32: cut = 2; p = t/2 going up, 1 − (t−2)/18 going down
    up = [1 / 32, (1 + 0.5 * 31) / 32]
    down = [(1 + (1 - (step - 2) / 18) * 31) / 32 for step in range(2, 21)]
    assert [slanted_triangular(step, 20, 0.1) for step in range(21)] == pytest.approx(up + down)
    assert down[0] == 1
    assert down[-1] == 1 / 32


def test_slanted_triangular_equals_the_papers_formula_wherever_its_cut_is_whole():
    def paper(step, total, cut_fraction, ratio=32):
        cut = math.floor(total * cut_fraction)
        share = step / cut if step < cut else 1 - (step - cut) / (cut * (1 / cut_fraction - 1))
        return (1 + share * (ratio - 1)) / ratio

    for total, warmup in [(100, 0.1), (40, 0.25), (1000, 0.5)]:
        for step in range(total + 1):
            assert slanted_triangular(step, total, warmup) == pytest.approx(paper(step, total, warmup))


@every_schedule
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.99])
def test_a_multiplier_stays_in_bounds_has_one_peak_and_no_dead_step(schedule, total, warmup):
    values = [schedule(step, total, warmup) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert values[peak:] == sorted(values[peak:], reverse=True)
    assert max(values) == 1 or schedule is slanted_triangular  # whose first step is low, were there only one


@every_schedule
def test_a_step_past_the_end_is_not_negative(schedule):
    assert 0 <= schedule(12, 10, 0.1) <= 1


def test_cosine_by_hand():
    expected = [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]
    assert [cosine(step, 6, 0.4) for step in range(7)] == pytest.approx(expected)


def test_polynomial_by_hand():
    assert [polynomial(step, 5, 0.2) for step in range(6)] == pytest.approx([1 / 2, 1, 9 / 16, 4 / 16, 1 / 16, 0])
    straight = [linear(step, 9, 0.4) for step in range(9)]
    assert [polynomial(step, 9, 0.4, power=1) for step in range(9)] == pytest.approx(straight)


def test_inverse_square_root_by_hand():
    # c = 3: it falls to a half where step + 1 is four times c + 1
    assert [inverse_sqrt(step, 100, 0.03) for step in (0, 2, 3, 8, 15)] == pytest.approx(
        [1 / 4, 3 / 4, 1, 2 / 3, 1 / 2]
    )


def test_one_cycle_by_hand():
    # 8 steps, 4 up: half of the way at 2 lies half between 1/25 and 1; half of the way down at 6
    expected = [1 / 25, (1 + 1 / 25) / 2, 1, (1 + 1 / 250_000) / 2, 1 / 250_000]
    assert [one_cycle(step, 8, 0.5) for step in (0, 2, 4, 6, 8)] == pytest.approx(expected)


def test_warmup_stable_decay_by_hand():
    expected = [1 / 2, 1, 1, 1, 1, 1, 1, 1, 2 / 2, 1 / 2]
    assert [warmup_stable_decay(step, 10, 0.1) for step in range(10)] == pytest.approx(expected)
    assert warmup_stable_decay(5, 10, 0.1, decay=0.8) == pytest.approx(5 / 8)


def test_reductions_by_hand():
    flat = [(0.5, 1.0)] * 6
    assert [reductions(flat[:count], 2) for count in range(7)] == [0, 0, 0, 1, 1, 2, 2]
    assert reductions([(0.5, 1.0), (0.4, 1.0), (0.6, 1.0), (0.5, 1.0)], 2) == 0  # a better one starts the count anew
    assert reductions([(3.0, 1.0), (2.0, 0.9), (1.0, 0.8)], 1, lower_is_better=True) == 0


def test_constants_are_those_of_the_name():
    assert shaped("polynomial", power=3.0)(2, 4, 0.0) == pytest.approx(1 / 8)
    assert shaped("warmup_stable_decay", decay=0.5)(3, 4, 0.0) == pytest.approx(1 / 2)
    assert shaped("cosine") is cosine


def test_the_docs_show_the_schedules_as_they_are():
    root = Path(__file__).parents[2]
    drawing = runpy.run_path(str(root / "benchmarks" / "draw_schedules.py"))
    assert (root / "docs" / "schedules.svg").read_text(encoding="utf-8") == drawing["picture"]()
