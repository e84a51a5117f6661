import numpy as np
import pytest

from moss_rlhf.tasks.metrics import accuracy, confusion, macro_f1


def test_confusion_has_truth_in_rows():
    assert confusion([0, 0, 1, 2, 2, 2], [0, 1, 1, 0, 2, 2], 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 2]]


def test_metrics_by_hand():
    counts = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 2]])
    assert accuracy(counts) == pytest.approx(4 / 6)
    # F1: class 0 2/(2+1+1), class 1 2/(2+1+0), class 2 4/(4+0+1)
    assert macro_f1(counts) == pytest.approx((1 / 2 + 2 / 3 + 4 / 5) / 3)


def test_a_class_that_is_nowhere_is_left_out_and_one_never_right_is_zero():
    assert macro_f1(np.array([[3, 0, 0], [0, 2, 0], [0, 0, 0]])) == 1.0
    assert macro_f1(np.array([[3, 0], [2, 0]])) == pytest.approx((6 / 8 + 0) / 2)


def test_stacks_of_matrices_give_stacks_of_values():
    generator = np.random.default_rng(0)
    stack = generator.integers(0, 9, (5, 4, 3, 3))
    for metric in (accuracy, macro_f1):
        assert np.allclose(metric(stack), [[metric(matrix) for matrix in row] for row in stack], rtol=1e-15)


@pytest.mark.parametrize(
    ("labels", "predictions", "word"),
    [([], [], "at least one row"), ([0, 1], [0], "equally long"), ([0, 3], [0, 1], "labels"), ([0], [-1], "predict")],
)
def test_what_can_not_be_counted(labels, predictions, word):
    with pytest.raises(ValueError, match=word):
        confusion(labels, predictions, 3)
