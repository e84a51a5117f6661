"""A recipe's options of fine-tuning reach the method: what they do is seen in the network."""

import pytest

from moss_rlhf.progress import Progress
from moss_rlhf.recipe import make_recipe, stage_spec
from moss_rlhf.stages import StageContext, apply_stage
from moss_rlhf.tasks.loading import encoded


@pytest.fixture
def staged(tiny_model, rows, tmp_path):
    def run(**fields):
        recipe = make_recipe(
            {
                "task": "text-classification",
                "model": "org/name",
                "data": {"train": "train.csv"},
                "stages": [{"finetune": {"epochs": 2, "batch_size": 20, "learning_rate": 1e-3, **fields}}],
            }
        )
        model = tiny_model(blocks=1)
        data = encoded(model, rows)
        context = StageContext(data, data, data, data, 0, tmp_path, lambda _: model, Progress(quiet=True))
        return model, apply_stage(stage_spec(recipe.stages[0]), model, context)

    return run


def test_losses_optimizer_schedule_and_rounding_from_a_recipe(staged):
    model, outcome = staged(
        loss={"class_weights": {"positive": 2}, "gamma": 1, "r_drop": 0.5},
        optimizer={"name": "sgd", "momentum": 0.5},
        schedule={"name": "warmup_stable_decay", "decay": 0.5},
        l2="1e-3",
        movement={"sparsity": 0.5},
        quantization_aware={"scheme": "int8", "activations": True},
    )
    assert outcome.facts["quantization_aware"] == "int8"
    assert outcome.facts["movement_sparsity"] >= 0.49
    assert len(model.pruned) == len(model.anatomy.matrices)
    rates = [point["learning_rate"] for point in outcome.history["train"]]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])  # the last 3 of 6 fall


def test_nested_options_of_an_ensembles_members(tiny_model, rows, tmp_path):
    """The example of docs/ensemble.md, and more of its kind."""
    members = {
        "early_stopping": {"patience": 2},
        "loss": {"label_smoothing": 0.1},
        "phases": [{"train": ["head"], "epochs": 1, "learning_rate": 1e-3}],
    }
    recipe = make_recipe(
        {
            "task": "text-classification",
            "model": "org/name",
            "data": {"train": "train.csv"},
            "stages": [{"ensemble": {"members": 2, "finetune": members}}],
        }
    )
    model = tiny_model(blocks=1)
    data = encoded(model, rows)
    context = StageContext(data, data, data, data, 0, tmp_path, lambda _: model, Progress(quiet=True))
    outcome = apply_stage(stage_spec(recipe.stages[0]), model, context)
    assert outcome.flops > 0


def test_l1_from_a_recipe(staged):
    model, outcome = staged(l1=20, optimizer="adam", schedule="constant")
    assert outcome.facts["l1_sparsity"] > 0
    assert model.pruned
