"""`distill: auto`: the parent after a compressing stage, where its head was trained; and what `moss check` finds."""

import csv
import json

import pytest

from moss_rlhf.checking import check, check_stages, settled
from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.recipe import DistillSpec, make_recipe, recipe_values, settle_distillation

LABELS = ("negative", "positive")
PRUNE = {"prune": {"sparsity": 0.5}}


def _recipe(*stages, model="org/name", train="train.csv"):
    return make_recipe(
        {"task": "text-classification", "model": str(model), "data": {"train": str(train)}, "stages": list(stages)}
    )


def _teachers(recipe, trained=False):
    stages = settle_distillation(recipe, trained).stages
    return [stage.finetune.distill for stage in stages if hasattr(stage, "finetune")]


def test_auto_is_the_parent_after_compression_alone():
    assert _teachers(_recipe("finetune", PRUNE, "finetune", "finetune")) == [None, DistillSpec(), DistillSpec()]


def test_auto_is_nobody_where_rows_are_mixed():
    mixed = {"finetune": {"mixup": 0.2}}
    assert _teachers(_recipe("finetune", PRUNE, mixed)) == [None, None]


def test_an_ensemble_mixes_no_rows():
    with pytest.raises(RecipeError, match="mixed rows have no answer of theirs; leave mixup out"):
        _recipe({"ensemble": {"finetune": {"mixup": 0.2}}})


def test_auto_asks_no_head_that_was_never_trained():
    assert _teachers(_recipe(PRUNE, "finetune")) == [None]
    assert _teachers(_recipe(PRUNE, "finetune"), trained=True) == [DistillSpec()]


def test_what_is_said_stays():
    given = {"finetune": {"distill": {"temperature": 3.0}}}
    for none in ("none", None):
        recipe = _recipe("finetune", PRUNE, given, {"finetune": {"distill": none}})
        assert _teachers(recipe) == [None, DistillSpec(temperature=3.0), None]


def test_a_settled_recipe_says_so_and_reads_back():
    recipe = settle_distillation(_recipe("finetune", PRUNE, "finetune"), False)
    values = recipe_values(recipe)
    assert values["stages"][0]["finetune"]["distill"] is None
    assert values["stages"][2]["finetune"]["distill"]["teacher"] == "parent"
    assert make_recipe(values) == recipe


def test_the_checkpoint_decides_whether_its_head_is_trained(tiny_checkpoint):
    assert _teachers(settled(_recipe(PRUNE, "finetune", model=tiny_checkpoint("bert")))) == [None]
    trained = tiny_checkpoint("bert", LABELS)
    assert _teachers(settled(_recipe(PRUNE, "finetune", model=trained))) == [DistillSpec()]


def test_check_says_what_was_decided(tiny_checkpoint, rows, tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    stages = ("finetune", PRUNE, "finetune")
    found = check(_recipe(*stages, model=tiny_checkpoint("bert"), train=tmp_path / "train.csv"))
    assert found.notes[-1] == "stages.2.finetune learns from its parent (distill: auto; none turns it off)."


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([[2, 2]], r"stages\.2\.finetune\.distill\.layers: \[2, 2\] must be .*below 2 and 3"),
        ([[0, 3]], r"\[0, 3\] must be"),
    ],
)
def test_pairs_that_name_no_layer(layers, message, tiny_checkpoint):
    stages = ("finetune", {"shorten": {"remove": 1}}, {"finetune": {"distill": {"hidden": 1, "layers": layers}}})
    place = tiny_checkpoint("bert", blocks=3)
    with pytest.raises(ModelError, match=message):
        check_stages(_recipe(*stages, model=place), place)


def test_a_teacher_with_another_tokenizer(tiny_checkpoint, tmp_path):
    place, teacher = tiny_checkpoint("bert"), tiny_checkpoint("roberta", LABELS)
    recipe = _recipe({"finetune": {"distill": {"teacher": str(teacher)}}}, model=place)
    with pytest.raises(ModelError, match=r"stages\.0\.finetune\.distill\.teacher: .*has another vocabulary"):
        check_stages(recipe, place)
    check_stages(
        _recipe({"finetune": {"distill": {"teacher": str(tiny_checkpoint("bert", LABELS))}}}, model=place), place
    )


def test_no_pairs_and_half_pairs():
    for layers in ([], [[1]], [[0, -1]], "first"):
        with pytest.raises(RecipeError, match=r"stages\.0\.finetune\.distill\.layers"):
            _recipe({"finetune": {"distill": {"layers": layers}}})


def test_the_schema_knows_none():
    from moss_rlhf.recipe import Recipe

    schema = json.dumps(Recipe.model_json_schema()["$defs"]["FinetuneSpec"]["properties"]["distill"])
    assert '"const": "none"' in schema


def test_specs_are_the_methods_arguments():
    """A field is a keyword of the method, or of its options, with the same default."""
    import dataclasses
    import inspect

    from moss_rlhf.finetuning import finetune, pretrain
    from moss_rlhf.finetuning.options import Adapter, Distillation
    from moss_rlhf.recipe import FinetuneSpec, PretrainSpec
    from moss_rlhf.recipe.finetuning import AdapterSpec

    for spec, method, apart in (
        (FinetuneSpec, finetune, {"distill", "epochs", "report_to"}),
        (PretrainSpec, pretrain, {"texts"}),
    ):
        keywords = inspect.signature(method).parameters
        for name, field in spec.model_fields.items():
            assert name in keywords
            assert name in apart or keywords[name].default == field.default, name
    for spec, options, apart in ((DistillSpec, Distillation, {"teacher"}), (AdapterSpec, Adapter, set())):
        defaults = {field.name: field.default for field in dataclasses.fields(options)}
        assert {name: field.default for name, field in spec.model_fields.items() if name not in apart} == defaults


def test_an_adapter_in_a_pruned_model(tiny_checkpoint):
    place = tiny_checkpoint("bert")
    with pytest.raises(RecipeError, match=r"stages\.2\.finetune\.adapter: the model is pruned"):
        check_stages(_recipe("finetune", PRUNE, {"finetune": {"adapter": {}}}, model=place), place)
    check_stages(_recipe("finetune", PRUNE, {"finetune": {"adapter": {"keep_zeros": True}}}, model=place), place)
    with pytest.raises(RecipeError, match=r"stages\.0\.finetune\.adapter\.targets"):
        _recipe({"finetune": {"adapter": {"targets": "everything"}}})
