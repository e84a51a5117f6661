import numpy as np
import pytest

from moss_rlhf.evaluation import measure_speed, speed_batches
from moss_rlhf.progress import Progress
from moss_rlhf.tasks.batching import batches_of

QUIET = Progress(quiet=True)
PADDING = {"input_ids": 9, "attention_mask": 0}


class Clock:
    """Stands still but for what runtimes add."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeRuntime:
    """Takes the next of `seconds` at each call, the last one for ever; writes its name into `diary`."""

    def __init__(self, name: str, clock: Clock, seconds: list[float], diary: list[str]) -> None:
        self.name, self.clock, self.seconds, self.diary = name, clock, seconds, diary
        self.batches: list[int] = []

    def run(self, batch):
        self.diary.append(self.name)
        self.batches.append(id(batch))
        self.clock.now += self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return np.zeros((len(batch["input_ids"]), 2), dtype=np.float32)


def row(length: int, value: int = 1) -> dict[str, list[int]]:
    return {"input_ids": [value] * length, "attention_mask": [1] * length, "labels": [0]}


def rows(count: int) -> list[dict[str, list[int]]]:
    return [row(1 + index % 7, value=index) for index in range(count)]


def test_batches_are_padded_to_their_own_longest_row() -> None:
    first, second = batches_of([row(2), row(3), row(1)], 2, PADDING)
    assert first["input_ids"].tolist() == [[1, 1, 9], [1, 1, 1]]
    assert first["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert second["input_ids"].tolist() == [[1]]
    assert set(first) == set(PADDING)
    assert first["input_ids"].dtype == np.int64


def test_no_rows_make_no_batches_and_size_zero_is_refused() -> None:
    assert batches_of([], 4, PADDING) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        batches_of(rows(3), 0, PADDING)


def test_samples_are_seeded_full_batches_of_distinct_rows_not_in_order() -> None:
    batches = speed_batches(rows(1000), [1, 8, 32, 128], PADDING, seed=3)
    assert {size: len(group) for size, group in batches.items()} == {1: 64, 8: 32, 32: 8, 128: 4}
    assert all(len(batch["input_ids"]) == size for size, group in batches.items() for batch in group)
    ids = [int(batch["input_ids"][0, 0]) for batch in batches[1]]
    assert len(set(ids)) == 64 and ids != sorted(ids)
    again = speed_batches(rows(1000), [1], PADDING, seed=3)[1]
    assert [int(batch["input_ids"][0, 0]) for batch in again] == ids
    other = speed_batches(rows(1000), [1], PADDING, seed=4)[1]
    assert [int(batch["input_ids"][0, 0]) for batch in other] != ids


@pytest.mark.parametrize(("available", "expected"), [(70, 2), (33, 1), (5, 1)])
def test_few_rows_make_few_batches_but_full_ones(available: int, expected: int) -> None:
    group = speed_batches(rows(available), [32], PADDING, seed=0)[32]
    assert [len(batch["input_ids"]) for batch in group] == [32] * expected
    values = {int(batch["input_ids"][index, 0]) for batch in group for index in range(32)}
    assert len(values) == min(available, 32 * expected)


def test_without_rows_there_is_no_speed() -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        speed_batches([], [1], PADDING, seed=0)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        speed_batches(rows(3), [0], PADDING, seed=0)


def test_runtimes_take_turns_on_the_same_batches_and_the_warm_up_is_not_counted() -> None:
    clock, diary = Clock(), []
    first = FakeRuntime("A", clock, [50.0, 50.0, 0.5], diary)
    second = FakeRuntime("B", clock, [70.0, 70.0, 0.25], diary)
    batches = {4: batches_of(rows(8), 4, PADDING)}
    speed = measure_speed({"first": first, "second": second}, batches, rounds=3, clock=clock, progress=QUIET)
    assert diary == ["A", "A", "B", "B"] * 4
    assert first.batches == second.batches
    assert speed["first"] == {"latency_ms": {"4": {"p50": 500.0, "p95": 500.0}}, "throughput": {"4": 8.0}}
    assert speed["second"] == {"latency_ms": {"4": {"p50": 250.0, "p95": 250.0}}, "throughput": {"4": 16.0}}


def test_medians_over_rounds_come_before_percentiles_over_batches() -> None:
    """Two batches, three rounds: (1, 3), (1, 100), (2, 4). Medians 1 and 4 s; round sums 4, 101, 6 s, median 6."""
    clock = Clock()
    runtime = FakeRuntime("A", clock, [9.0, 9.0, 1.0, 3.0, 1.0, 100.0, 2.0, 4.0], [])
    batches = {5: batches_of(rows(10), 5, PADDING)}
    speed = measure_speed({"A": runtime}, batches, rounds=3, clock=clock, progress=QUIET)["A"]
    assert speed["latency_ms"]["5"] == pytest.approx({"p50": 2500.0, "p95": 3850.0})
    assert speed["throughput"]["5"] == pytest.approx(10 / 6)


@pytest.mark.parametrize(("budget", "rounds"), [(0.5, 3), (10.0, 5), (100.0, 9)])
def test_rounds_fit_the_budget_shared_by_the_batch_sizes(budget: float, rounds: int) -> None:
    clock, diary = Clock(), []
    runtime = FakeRuntime("A", clock, [1.0], diary)
    batches = {size: batches_of(rows(size), size, PADDING) for size in (1, 4)}
    measure_speed({"A": runtime}, batches, budget_seconds=budget, clock=clock, progress=QUIET)
    assert len(diary) == 2 * (1 + rounds)


def test_a_clock_that_stands_still_in_the_warm_up_means_the_most_rounds() -> None:
    clock, diary = Clock(), []
    runtime = FakeRuntime("A", clock, [0.0, 0.0, 1.0], diary)
    measure_speed({"A": runtime}, {1: batches_of(rows(1), 1, PADDING)}, warmup=2, clock=clock, progress=QUIET)
    assert len(diary) == 2 + 9


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got warmup 0"):
        measure_speed({}, {}, warmup=0, progress=QUIET)
    with pytest.raises(ValueError, match=r"batches\[8\] is empty"):
        measure_speed({}, {8: []}, progress=QUIET)
