import json
import re
import subprocess
import sys

import pytest
from pydantic import ValidationError

from moss_rlhf.errors import RecipeError
from moss_rlhf.recipe import (
    FinetuneSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    make_recipe,
    recipe_values,
    stage_kind,
    stage_spec,
    stages_before_compression,
)

FULL = {
    "task": "text-classification",
    "model": "org/name",
    "data": {
        "train": {"file": "train.csv", "header": False, "columns": {"label": 0, "text": [1, 2]}, "labels": {"1": 0}},
        "validation": 0.2,
        "test": {"hub": "org/data", "split": "validation"},
        "columns": {"text": "review"},
        "labels": {"0": "negative", "1": True},
        "max_length": 64,
        "limit": {"train": 100},
    },
    "stages": [
        {"finetune": {"epochs": 1, "early_stopping": {"patience": 1}, "unfreeze": "gradual"}},
        {"narrow": {"heads": 0.5}},
        {"shorten": None},
        {"prune": {"sparsity": 0.5}},
        {"finetune": {"distill": {"teacher": "parent"}, "schedule": "slanted_triangular"}},
        "quantize",
    ],
    "evaluate": {"batch_sizes": [1, 2]},
    "export": ["onnx"],
}


def test_specs_are_frozen_to_the_bottom():
    recipe = make_recipe(FULL)
    for part, field in [(recipe, "seed"), (recipe.data, "limit"), (recipe.stages[0].finetune, "epochs")]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 1)


def test_stage_forms_mean_the_same():
    forms = ["quantize", {"quantize": None}, {"quantize": {}}, {"quantize": {"scheme": "int8"}}]
    recipes = [make_recipe(FULL | {"stages": [form]}) for form in forms]
    assert all(recipe == recipes[0] for recipe in recipes)
    assert stage_kind(recipes[0].stages[0]) == "quantize"
    assert stage_spec(recipes[0].stages[0]) == QuantizeSpec()


def test_what_enters_the_first_compressing_stage_is_before():
    def before(*stages):
        return stages_before_compression(make_recipe(FULL | {"stages": list(stages)}))

    prune = {"prune": {"sparsity": 0.5}}
    assert before("finetune") == 1
    assert before("finetune", "finetune", prune, "finetune") == 2
    assert before(prune, "finetune", "quantize") == 0


def test_a_number_written_as_text_is_the_number():
    recipe = make_recipe(FULL | {"stages": [{"finetune": {"learning_rate": "5e-5", "epochs": "2"}}]})
    assert recipe.stages[0].finetune == FinetuneSpec(learning_rate=5e-5, epochs=2)
    assert make_recipe(FULL | {"data": {"train": "a", "validation": "0.25"}}).data.validation == 0.25
    assert make_recipe(FULL | {"data": {"train": "a", "validation": "dev.csv"}}).data.validation == "dev.csv"


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan"), float("inf")])
def test_sparsity_stays_inside_its_bounds(share):
    with pytest.raises(ValidationError):
        PruneSpec(sparsity=share)


def test_reading_a_recipe_imports_nothing_heavy():
    program = "import sys, moss_rlhf.recipe; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "datasets", "numpy", "pyarrow"} & set(loaded)


# --- the JSON Schema -------------------------------------------------------------------------------------------------

TYPES = {
    "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
    "null": type(None),
}  # fmt: skip


def fits(value, schema, root):
    """Whether a JSON value is valid: the keywords of Draft 2020-12 that the recipe's schema uses, and no others."""
    checks = {
        "$ref": lambda name: fits(value, root["$defs"][re.fullmatch(r"#/\$defs/(\w+)", name)[1]], root),
        "type": lambda names: any(is_of(value, name) for name in ([names] if isinstance(names, str) else names)),
        "enum": lambda known: value in known,
        "const": lambda known: value == known,
        "anyOf": lambda members: any(fits(value, member, root) for member in members),
        "oneOf": lambda members: sum(fits(value, member, root) for member in members) == 1,
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
        "minLength": lambda bound: len(value) >= bound,
        "maxLength": lambda bound: len(value) <= bound,
        "minItems": lambda bound: len(value) >= bound,
        "minProperties": lambda bound: len(value) >= bound,
        "maxProperties": lambda bound: len(value) <= bound,
        "items": lambda member: all(fits(item, member, root) for item in value),
        "required": lambda names: set(names) <= set(value),
        "properties": lambda known: all(fits(value[name], known[name], root) for name in known if name in value),
        "propertyNames": lambda member: all(fits(name, member, root) for name in value),
        "additionalProperties": lambda member: all(
            member is not False and fits(value[name], member, root)
            for name in value
            if name not in schema.get("properties", {})
        ),
    }
    words = {"title", "description", "default", "$defs"}
    asked = sorted(set(schema) - words, key=lambda keyword: keyword != "type")  # a wrong type ends it
    return all(checks[keyword](schema[keyword]) for keyword in asked)


def is_of(value, name):
    return isinstance(value, TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))


def valid(recipe):
    schema = json.loads(json.dumps(Recipe.model_json_schema()))
    return fits(json.loads(json.dumps(recipe)), schema, schema)


def test_the_schema_accepts_what_a_recipe_may_be():
    make_recipe(FULL)
    assert valid(FULL)
    assert valid(recipe_values(make_recipe(FULL)))  # with every default filled in


@pytest.mark.parametrize(
    "fields",
    [
        {"sed": 1},
        {"stages": []},
        {"stages": ["quantise"]},
        {"stages": [{"finetune": {"epocs": 1}}]},
        {"stages": [{"finetune": {"epochs": 0}}]},
        {"stages": [{"finetune": {}, "quantize": {}}]},
        {"stages": [{"narrow": {"heads": 1.0}}]},
        {"data": {}},
        {"data": {"train": "a", "limit": {"tran": 1}}},
        {"data": {"train": "a", "max_length": "autoo"}},
        {"evaluate": {"batch_sizes": [0]}},
        {"export": ["onyx"]},
        {"seed": -1},
        {"task": "poetry"},
    ],
)
def test_schema_and_reader_refuse_the_same(fields):
    assert not valid(FULL | fields)
    with pytest.raises(RecipeError):
        make_recipe(FULL | fields)


def test_every_default_in_the_schema_is_itself_valid():
    root = Recipe.model_json_schema()
    for spec in [root, *root["$defs"].values()]:
        for name, field in spec.get("properties", {}).items():
            assert "default" not in field or fits(field["default"], field, root), name


def test_an_ensemble_has_every_field_of_finetune_but_a_teacher():
    stage = {"ensemble": {"members": 2, "by": "folds", "finetune": {"phases": [{"epochs": 2}, {"epochs": 1}]}}}
    recipe = make_recipe(FULL | {"stages": [stage, "quantize"]})
    spec = stage_spec(recipe.stages[0])
    assert (spec.finetune.epochs, spec.distill.weight, stages_before_compression(recipe)) == (3, 0.7, 1)
    assert make_recipe(recipe_values(recipe)) == recipe
    with pytest.raises(RecipeError, match=r"stages\.0\.ensemble: the members are the teachers; leave finetune"):
        make_recipe(FULL | {"stages": [{"ensemble": {"finetune": {"distill": {}}}}]})
    with pytest.raises(RecipeError, match=r"stages\.0\.ensemble\.members: 1 can't be used"):
        make_recipe(FULL | {"stages": [{"ensemble": {"members": 1}}]})
    with pytest.raises(RecipeError, match=r"stages\.0\.ensemble\.finetune.*epoch.*epochs"):
        make_recipe(FULL | {"stages": [{"ensemble": {"finetune": {"epoch": 1}}}]})
