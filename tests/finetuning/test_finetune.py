"""What fine-tuning does: it learns, layer by layer as told, keeps the best weights, and says when it can't."""

import pytest
import torch
from safetensors.torch import load_file

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.finetune import evaluate_loss
from moss_rlhf.finetuning.layers import layer_groups
from moss_rlhf.finetuning.running import evaluation_steps
from moss_rlhf.finetuning.trainer import LayerwiseTrainer
from moss_rlhf.optimization import prune, quantize
from moss_rlhf.strategy import lowest_trained
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

TASK = TASKS["text-classification"]
LEARNING = {"epochs": 8, "learning_rate": 5e-3, "batch_size": 8, "precision": "float32"}


def _weights(model):
    return {name: value.clone() for name, value in model.network.state_dict().items()}


def _flipped(rows):
    other = {"positive": "negative", "negative": "positive"}
    return [{**row, "label": other[row["label"]]} for row in rows]


def test_learns_what_can_be_learned(tiny_model, rows):
    model = tiny_model()
    before = evaluate_loss(model, encoded(model, rows), TASK)
    training = finetune(model, rows, rows, **LEARNING)
    after = evaluate_loss(model, encoded(model, rows), TASK)
    assert before["accuracy"] < 0.6
    assert after["accuracy"] > 0.95
    assert training.facts["best_validation_accuracy"] == after["accuracy"]
    assert training.facts["steps"] == 64
    assert [point["step"] for point in training.history["validation"]] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert not model.network.training
    assert all(parameter.requires_grad for parameter in model.network.parameters())


def test_gradual_moves_a_layer_only_once_it_is_thawed(tiny_model, rows, acting):
    """Frozen layers neither move nor decay, thawed ones move at once; the optimizer that Trainer builds would not."""
    model = tiny_model()
    seen = []

    def snapshot(_):
        seen.append(
            [[value.detach().clone() for _, value in group.parameters] for group in layer_groups(model.network)]
        )

    snapshot(0)
    finetune(
        model, rows, rows, epochs=1, batch_size=6, learning_rate=1e-3, weight_decay=0.5,
        schedule="constant", unfreeze="gradual", precision="float32", progress=acting(snapshot),
    )  # fmt: skip
    assert len(seen) == 11
    for step in range(10):
        lowest = lowest_trained(step, 10, 5, "gradual")
        moved = [
            any(not torch.equal(old, new) for old, new in zip(*parts, strict=True))
            for parts in zip(seen[step], seen[step + 1], strict=True)
        ]
        assert moved == [level >= lowest for level in range(5)], step


def test_optimizer_holds_every_parameter_once_with_its_layers_rate(tiny_model, rows, monkeypatch):
    model, built = tiny_model(), []
    create = LayerwiseTrainer.create_optimizer

    def spy(self, model=None):
        built.append([dict(group) for group in create(self, model).param_groups])
        return self.optimizer

    monkeypatch.setattr(LayerwiseTrainer, "create_optimizer", spy)
    finetune(model, rows[:8], rows[:8], epochs=1, learning_rate=0.01, layer_decay=0.5, weight_decay=0.3)
    (groups,) = built
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.network.parameters())
    assert [group["lr"] for group in groups[::2]] == [0.01 * 0.5**level for level in (4, 3, 2, 1, 0)]
    for group in groups:
        assert {parameter.dim() > 1 for parameter in group["params"]} == {group["weight_decay"] == 0.3}


def test_early_stopping_stops_and_keeps_the_best_weights_not_the_last(tiny_model, rows, tmp_path):
    """Validation is the training rows with the labels exchanged: the better it learns, the worse it is."""
    model = tiny_model()
    settings = {
        "epochs": 6,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "early_stopping": {"patience": 2},
        "precision": "float32",
    }
    training = finetune(model, rows, _flipped(rows), workspace=tmp_path, **settings)
    history = training.history["validation"]
    best = max(history, key=lambda point: (point["accuracy"], -point["loss"]))
    assert training.facts["stopped_early"]
    assert training.facts["best_step"] == best["step"]
    assert [point["step"] for point in history][-3] == best["step"], (
        "two evaluations without a better one, then the end"
    )
    measured = evaluate_loss(model, encoded(model, _flipped(rows)), TASK)
    assert measured["loss"] == best["loss"] != history[-1]["loss"]
    assert measured["accuracy"] == best["accuracy"] > history[-1]["accuracy"]
    kept = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in _weights(model).items())


def test_pruned_zeros_stay_zero_and_the_rest_trains(tiny_model, rows):
    model = tiny_model()
    prune(model, sparsity=0.4)
    before = [parameter.detach().clone() for parameter in model.pruned]
    finetune(model, rows, rows, epochs=1, batch_size=8, learning_rate=1e-3)
    for old, new in zip(before, model.pruned, strict=True):
        assert torch.equal(old == 0, new == 0)
        assert not torch.equal(old, new)


def test_distillation_pulls_the_student_to_its_teacher(tiny_model, rows):
    """With the teacher's loss alone, its answers are learned, whatever the labels say."""
    teacher, student = tiny_model(), tiny_model(blocks=2)
    finetune(teacher, rows, rows, **LEARNING)
    finetune(student, _flipped(rows), rows, teacher=teacher, distill={"weight": 1.0}, **LEARNING)
    assert evaluate_loss(student, encoded(student, rows), TASK)["accuracy"] > 0.95


def test_a_teacher_of_other_labels_or_words_is_refused(tiny_model, rows):
    model, stranger = tiny_model(), tiny_model(labels=("positive", "negative"))
    with pytest.raises(ModelError, match="teacher's labels are positive, negative, the model's negative, positive"):
        finetune(model, rows, rows, teacher=stranger)
    with pytest.raises(ModelError, match="another vocabulary"):
        finetune(model, rows, rows, teacher=tiny_model("roberta"))


def test_a_loss_that_is_not_finite_is_an_error(tiny_model, rows):
    model = tiny_model()
    model.network.classifier.weight.data[0, 0] = float("inf")
    with pytest.raises(ModelError, match=r"the loss became (nan|inf) at step 0, on rows .*Lower learning_rate"):
        finetune(model, rows, rows, epochs=1)
    assert all(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize(("train", "validation", "name"), [(0, 8, "train"), (8, 0, "validation")])
def test_no_rows_are_an_error(tiny_model, rows, train, validation, name):
    with pytest.raises(DataError, match=f"{name} holds no rows"):
        finetune(tiny_model(), rows[:train], rows[:validation])


def test_evaluations_are_even_and_end_with_the_last_step():
    assert evaluation_steps(10, 2, 1) == {10, 20}
    assert evaluation_steps(10, 2, 4) == {2, 5, 8, 10, 12, 15, 18, 20}
    assert evaluation_steps(2, 3, 9) == {1, 2, 3, 4, 5, 6}


def test_bfloat16_trains_float32_weights(tiny_model, rows):
    model = tiny_model()
    training = finetune(model, rows, rows, **(LEARNING | {"precision": "bfloat16"}))
    assert training.facts["precision"] == "bfloat16 autocast"
    assert not {"forward", "_original_forward"} & vars(model.network).keys()  # what follows computes in float32 again
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert training.facts["best_validation_accuracy"] > 0.9


def test_flops_grow_with_what_trains(tiny_model, rows):
    """Forward 2 and backward 4 a multiply-accumulate; frozen blocks have no backward, so gradual lies between."""
    settings = {"epochs": 1, "batch_size": 6, "precision": "float32"}
    whole = finetune(tiny_model(), rows, rows, **settings).flops
    gradual = finetune(tiny_model(), rows, rows, unfreeze="gradual", **settings).flops
    assert whole / 3 < gradual < whole


def test_a_quantized_model_is_refused(tiny_model, rows):
    model = tiny_model()
    quantize(model)
    with pytest.raises(ModelError, match="quantized already"):
        finetune(model, rows, rows)
