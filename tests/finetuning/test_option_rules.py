"""What a recipe could not hold is refused in Python, too, before anything is trained."""

import pytest

import moss_rlhf
from moss_rlhf.errors import RecipeError

WRONG = [
    ({"learning_rate": 0}, r"finetune\.learning_rate: 0 can't be used; it must be greater than 0"),
    ({"learning_rate": -1e-3}, r"finetune\.learning_rate: -0\.001 can't be used"),
    ({"learning_rate": float("nan")}, r"finetune\.learning_rate: nan can't be used; it must be a finite number"),
    ({"epochs": 0}, r"finetune\.epochs: 0 can't be used; it must be greater than or equal to 1"),
    ({"batch_size": 0}, r"finetune\.batch_size: 0"),
    (
        {"unfreeze": "gradul"},
        r"finetune\.unfreeze: 'gradul' can't be used; it must be 'all', 'gradual' or",
    ),
    ({"precision": "fp8"}, r"finetune\.precision: 'fp8'"),
    ({"schedule": "linar"}, r"finetune\.schedule: 'linar' can't be used; it must be '"),
    ({"warmup": 2}, r"finetune\.warmup: 2 can't be used; it must be less than 1"),
    ({"weight_decay": -1}, r"finetune\.weight_decay: -1"),
    ({"layer_decay": 2.0}, r"finetune\.layer_decay: 2\.0"),
    ({"reinitialise": -1}, r"finetune\.reinitialise: -1"),
    ({"max_gradient_norm": 0}, r"finetune\.max_gradient_norm: 0"),
    ({"micro_batch_size": 0}, r"finetune\.micro_batch_size: 0"),
    ({"batch_tokens": 0}, r"finetune\.batch_tokens: 0"),
    ({"evaluations_per_epoch": 0}, r"finetune\.evaluations_per_epoch: 0"),
    ({"early_stopping": {"patience": 0}}, r"finetune\.early_stopping\.patience: 0"),
    ({"average": {"last": 1}}, r"finetune\.average\.last: 1"),
    ({"adapter": {"rank": 0}}, r"finetune\.adapter\.rank: 0"),
    ({"adapter": {"kind": "qlora"}}, r"finetune\.adapter\.kind: 'qlora'"),
    ({"loss": {"label_smoothing": 1.5}}, r"finetune\.loss\.label_smoothing: 1\.5"),
    ({"mixup": -1}, r"finetune\.mixup: -1"),
    ({"distill": {"weight": 0.5}}, r"finetune\.distill: there is no teacher"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=str)
def test_finetune(options, message, tiny_model, rows):
    model = tiny_model("bert")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    with pytest.raises(RecipeError, match=message):
        moss_rlhf.finetune(model, rows, rows, **options)
    assert all(value.equal(before[name]) for name, value in model.network.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, r"pretrain\.learning_rate: -1\.0"),
        ({"mask": 2.0}, r"pretrain\.mask: 2\.0 can't be used; it must be less than 1"),
        ({"held_out": 1.5}, r"pretrain\.held_out: 1\.5"),
        ({"batch_size": 0}, r"pretrain\.batch_size: 0"),
        ({"objective": "spans2"}, r"pretrain\.objective: 'spans2'"),
    ],
    ids=str,
)
def test_pretrain(options, message, tiny_model):
    with pytest.raises(RecipeError, match=message):
        moss_rlhf.pretrain(tiny_model("bert"), ["a text"] * 10, **options)


def test_ensemble(tiny_model, rows):
    with pytest.raises(RecipeError, match=r"ensemble\.finetune\.learning_rate: -1"):
        moss_rlhf.ensemble(tiny_model("bert"), rows, rows, finetune={"learning_rate": -1})


def test_distillation_with_a_teacher(tiny_model, rows):
    model = tiny_model("bert")
    with pytest.raises(RecipeError, match=r"finetune\.distill\.temperature: 0 can't be used; it must be"):
        moss_rlhf.finetune(model, rows, rows, teacher=model, distill={"temperature": 0})
