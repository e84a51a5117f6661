"""The scores' gradient by hand, the ramp, the target met, zeros that stay, and only evaluations at it that count."""

import pytest
import torch
from torch import nn

from moss_rlhf.errors import RecipeError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.movement import cubic_ramp, lowest, masked
from moss_rlhf.model.checkpoint import save_checkpoint
from moss_rlhf.optimization import prune
from moss_rlhf.tasks.loading import load

SETTINGS = {"epochs": 4, "batch_size": 8, "learning_rate": 3e-3, "precision": "float32"}


def test_the_gradient_of_scores_and_weights_by_hand():
    """y = W' x with x = (1, 2), dL/dy = (1, −1): dL/dW' = dL/dy xᵀ, dL/dS = dL/dW' ⊙ W, dL/dW = dL/dW' ⊙ M."""
    weight = nn.Parameter(torch.tensor([[3.0, -1.0], [0.5, 2.0]]))
    score = nn.Parameter(torch.zeros(2, 2))
    kept = torch.tensor([[True, False], [True, True]])
    seen = masked(weight, score, kept)
    assert seen.tolist() == [[3.0, 0.0], [0.5, 2.0]]
    (seen @ torch.tensor([1.0, 2.0]) @ torch.tensor([1.0, -1.0])).backward()
    assert weight.grad.tolist() == [[1.0, 0.0], [-1.0, -2.0]]
    assert score.grad.tolist() == [[3.0, -2.0], [-0.5, -4.0]]


def test_the_lowest_scores_are_exactly_as_many_as_asked_for():
    score = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, -torch.inf]])
    assert lowest(score, 3).tolist() == [[False, True, False], [False, True, True]]
    assert [int(lowest(torch.zeros(5, 7), count).sum()) for count in (0, 1, 20, 35)] == [0, 1, 20, 35]


def test_the_ramp_by_hand():
    assert [cubic_ramp(step, 2, 6) for step in (0, 2, 3, 4, 6, 9)] == [0, 0, 1 - 27 / 64, 7 / 8, 1, 1]


def test_the_target_is_met_in_every_matrix_and_survives(tiny_model, rows, tmp_path):
    model = tiny_model()
    training = finetune(model, rows, rows, movement={"sparsity": 0.6}, **SETTINGS)
    matrices = [matrix.parameter for matrix in model.anatomy.matrices]
    assert [int((weight == 0).sum()) for weight in matrices] == [int(weight.numel() * 0.6) for weight in matrices]
    assert {id(weight) for weight in model.pruned} == {id(weight) for weight in matrices}
    assert training.facts["movement_sparsity"] == pytest.approx(0.6, abs=0.001)
    assert not any(module._forward_pre_hooks for module in model.network.modules())
    save_checkpoint(model, tmp_path / "model")
    again = load(tmp_path / "model")
    zeros = [matrix.parameter == 0 for matrix in again.anatomy.matrices]
    finetune(again, rows, rows, epochs=1, batch_size=8, learning_rate=1e-3)
    assert all(
        torch.equal(matrix.parameter == 0, zero) for matrix, zero in zip(again.anatomy.matrices, zeros, strict=True)
    )


def test_evaluations_before_the_target_do_not_count(tiny_model, rows):
    """Nothing is learned, so denser is better: the best of all is before the ramp, the best that counts is after."""
    flipped = [{**row, "label": {"positive": "negative", "negative": "positive"}[row["label"]]} for row in rows]
    training = finetune(
        tiny_model(), rows, flipped, movement={"sparsity": 0.9, "end": 0.5}, early_stopping={"patience": 5}, **SETTINGS
    )
    history = training.history["validation"]
    assert [point["step"] for point in history] == [8, 16, 24, 32]
    assert training.facts["best_step"] >= 16
    best = max(history[1:], key=lambda point: (point["accuracy"], -point["loss"]))
    assert training.facts["best_step"] == best["step"]


def test_scores_choose_and_not_the_size_of_weights(tiny_model, rows):
    """A weight that the loss wants larger stays though it is small."""
    model = tiny_model()
    before = [matrix.parameter.detach().abs().clone() for matrix in model.anatomy.matrices]
    finetune(model, rows, rows, movement={"sparsity": 0.5}, **SETTINGS)
    same = [
        torch.equal(matrix.parameter == 0, lowest(size, int(size.numel() * 0.5)))
        for matrix, size in zip(model.anatomy.matrices, before, strict=True)
    ]
    assert not any(same)


def test_zeros_that_are_there_count_first(tiny_model, rows):
    model = tiny_model()
    prune(model, sparsity=0.3)
    zeros = [matrix.parameter == 0 for matrix in model.anatomy.matrices]
    finetune(model, rows, rows, movement={"sparsity": 0.5}, **SETTINGS)
    for matrix, zero in zip(model.anatomy.matrices, zeros, strict=True):
        assert bool((matrix.parameter == 0)[zero].all())
        assert int((matrix.parameter == 0).sum()) == int(zero.numel() * 0.5)


def test_soft_movement_drives_scores_down(tiny_model, rows):
    shares = {}
    for strength in (0.01, 100.0):
        soft = {"mode": "soft", "regularisation": strength, "threshold": 0.45, "score_learning_rate": 0.05}
        training = finetune(tiny_model(), rows, rows, movement=soft, **SETTINGS)
        shares[strength] = training.facts["movement_sparsity"]
    assert shares[0.01] < shares[100.0]
    assert shares[100.0] > 0.2


def test_pruned_by_movement_and_rounded_together(tiny_model, rows):
    from moss_rlhf.optimization import quantize

    model = tiny_model()
    finetune(model, rows, rows, movement={"sparsity": 0.5}, quantization_aware={"scheme": "int8"}, **SETTINGS)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    for matrix in model.anatomy.matrices:  # small ones may have been rounded to zero as well
        assert int((matrix.parameter == 0).sum()) >= int(matrix.parameter.numel() * 0.5)
    quantize(model)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"movement": {}}, "give sparsity with mode topv"),
        ({"movement": {"mode": "soft", "sparsity": 0.5}}, "give sparsity with mode topv"),
        ({"movement": {"sparsity": 0.5, "begin": 0.8}}, "begin: 0.8 can't be used"),
        ({"movement": {"sparsity": 1.0}}, "sparsity: 1.0 can't be used"),
        ({"movement": {"sparsity": 0.5}, "unfreeze": "gradual"}, "before all layers train"),
        ({"movement": {"sparsity": 0.5}, "l1": 0.1}, "movement and l1 both choose"),
    ],
)
def test_what_can_not_be_done_is_refused(tiny_model, rows, options, words):
    with pytest.raises(RecipeError, match=words):
        finetune(tiny_model(), rows[:8], rows[:8], **options)
