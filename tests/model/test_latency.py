import numpy as np
import pytest
import torch

from moss_rlhf.model.latency import PartShape, latency_table, latency_tables, measured_points, torch_seconds


def test_between_the_measured_widths_lie_straight_lines():
    table = latency_table(PartShape(hidden=8, units=12), [1, 2, 3, 12], lambda _, width: width**2 * 1.0)
    assert measured_points(12) == [1, 2, 4, 6, 8, 10, 12]
    assert table.tolist() == [1.0, 4.0, 10.0, 144.0]  # 3 lies halfway between 4 and 16


def test_noise_never_makes_a_wider_part_cheaper():
    times = iter([3.0, 5.0, 4.0, 6.0])
    table = latency_table(PartShape(hidden=8, units=3), [1, 2, 3], lambda *_: next(times))
    assert table.tolist() == [3.0, 5.0, 5.0]


def test_parts_of_one_shape_are_measured_once():
    asked = []
    shapes = {"a": PartShape(8, 4), "b": PartShape(8, 4), "c": PartShape(8, 2, head_size=4, queries=1)}
    latency_tables(shapes, {"a": [4], "b": [4], "c": [2]}, lambda shape, width: asked.append((shape, width)) or 1.0)
    assert len(asked) == len(set(asked)) == len(measured_points(4)) + len(measured_points(2))


@pytest.mark.parametrize(
    "shape", [PartShape(64, 16, head_size=16, queries=2), PartShape(64, 2048), PartShape(64, 2048, matrices=3)]
)
def test_the_machine_takes_longer_for_all_than_for_one_sixteenth(shape):
    torch.set_num_threads(1)
    measure = torch_seconds(rows=4, length=64)
    few, many = (np.median([measure(shape, width) for _ in range(3)]) for width in (shape.units // 16, shape.units))
    assert 0 < few < many
