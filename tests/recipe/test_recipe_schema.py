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


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"clean": {"duplicates": "yes"}},
            r"data\.clean\.duplicates: 'yes' can't be used; it must be 'off', 'flag' or 'drop'",
        ),
        ({"clean": {"empty": "mend"}}, r"data\.clean\.empty: 'mend' can't be used"),
        ({"clean": {"threshold": 1.5}}, r"data\.clean\.threshold: 1\.5 can't be used"),
        ({"clean": {"threshold": 0}}, r"data\.clean\.threshold"),
        ({"clean": {"label_support": 1}}, r"data\.clean\.label_support"),
        ({"clean": {"folds": 1}}, r"data\.clean\.folds"),
        ({"clean": {"boilerplate_rows": 1}}, r"data\.clean\.boilerplate_rows"),
        ({"clean": {"near_duplicate": "drop"}}, r"unknown field 'near_duplicate'; did you mean 'near_duplicates'"),
        ({"collect": {"count": 0, "keywords": ["a"]}}, r"data\.collect\.count: 0 can't be used"),
        ({"collect": {"count": 9}}, r"data\.collect: give at least one of like, keywords and perplexity\."),
        ({"collect": {"count": 9, "like": []}}, r"data\.collect: like: holds no example; give at least one text\."),
        ({"collect": {"count": 9, "keywords": [" "]}}, r"data\.collect: keywords: an empty word is in every text\."),
        ({"collect": {"count": 9, "like": "a.csv", "max_perplexity": 9}}, r"max_perplexity: needs perplexity"),
        ({"collect": {"count": 9, "like": "a.csv", "perplexity": "gpt2"}}, r"max_perplexity: is needed where `like`"),
        ({"collect": {"count": 9, "keywords": ["a"], "diversity": 2}}, r"data\.collect\.diversity: 2 can't be used"),
        ({"truncation": "middle"}, r"data\.truncation: 'middle' can't be used"),
        ({"balance": "weights"}, r"data\.balance: 'weights' can't be used"),
    ],
)
def test_what_data_cannot_do_is_refused(data, message):
    with pytest.raises(RecipeError, match=message):
        make_recipe(FULL | {"data": FULL["data"] | data})


def test_checks_that_are_on_come_in_their_order():
    recipe = make_recipe(
        FULL | {"data": FULL["data"] | {"clean": {"leaks": "drop", "markup": "mend", "empty": "flag"}}}
    )
    assert list(recipe.data.clean.checks.items()) == [("empty", "flag"), ("markup", "mend"), ("leaks", "drop")]
    assert make_recipe(recipe_values(recipe)) == recipe


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


def _finetune(**fields):
    return make_recipe(FULL | {"stages": [{"finetune": fields}]}).stages[0].finetune


def test_options_of_fine_tuning_from_a_recipe():
    spec = _finetune(
        loss={"label_smoothing": "0.1", "class_weights": {1: 2}, "r_drop": 1},
        optimizer={"name": "sgd", "momentum": 0.5},
        schedule={"name": "polynomial", "power": 3},
        l1="1e-4",
    )
    assert spec.loss.class_weights == {"1": 2.0}
    assert (spec.optimizer.momentum, spec.schedule.power, spec.l1) == (0.5, 3.0, 1e-4)
    assert _finetune(optimizer="adam", schedule="cosine").optimizer == "adam"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"optimizer": "adan"}, "optimizer: 'adan' can't be used; it must be 'adamw', 'adam', 'sgd' or 'adafactor'"),
        ({"optimizer": {"name": "adamw", "momentum": 0.9}}, "finetune.optimizer: momentum is for sgd, not adamw"),
        ({"optimizer": {"nam": "sgd"}}, "finetune.optimizer: unknown field 'nam'; did you mean 'name'"),
        ({"schedule": {"name": "linear", "power": 2}}, "finetune.schedule: power is for polynomial, not linear"),
        ({"schedule": {"name": "polynomial", "power": 0}}, "finetune.schedule.power: 0 can't be used"),
        ({"loss": {"gamma": 1, "kind": "mean_squared_error"}}, "finetune.loss: gamma is the focal loss's"),
        ({"loss": {"class_weights": {"a": 0}}}, "finetune.loss.class_weights.a: 0 can't be used"),
        ({"loss": {"label_smoothing": 1}}, "finetune.loss.label_smoothing: 1 can't be used"),
        ({"movement": {}}, "finetune.movement: give sparsity with mode topv"),
        ({"movement": {"sparsity": 0.5, "begin": 0.9}}, "finetune.movement: begin must be below end"),
        ({"movement": {"sparsity": 0.5}, "l1": 0.1}, "finetune: movement and l1 both choose"),
        ({"quantization_aware": {"scheme": "int8"}, "average": {"best": 2}}, "Leave average out, or movement"),
        ({"packing": True, "micro_batch_size": 2}, "a packed batch is one row"),
        ({"packing": True, "distill": {"hidden": 1}}, "tell its documents apart"),
        ({"adapter": {"kind": "lora"}, "l1": 0.1}, "the weights below adapters stand still"),
        ({"mixup": 0.2, "compile": "auto"}, "mixed rows have no compiled block"),
        ({"phases": [{"schedule": "reduce_on_plateau"}]}, "follows the evaluations of all phases"),
        ({"movement": {"sparsity": 0.5}, "unfreeze": "gradual"}, "a begin of at least 0.5"),
        ({"movement": {"sparsity": 0.5}, "unfreeze": "head_first"}, "a begin of at least 0.333"),
        ({"movement": {"sparsity": 0.5}, "phases": [{"train": ["head"]}]}, "they can't be scored. end with train: all"),
        ({"movement": {"sparsity": 0.5}, "phases": [{"train": ["head"]}, {"epochs": 3}]}, "a begin of at least 0.25"),
        ({"quantization_aware": {"scheme": "int4", "activations": True}}, "rounded by int8 alone"),
    ],
)
def test_options_that_can_not_be_met_are_refused_at_their_place(fields, words):
    with pytest.raises(RecipeError) as caught:
        _finetune(**fields)
    assert words in str(caught.value)


def test_what_is_trained_for_a_grid_is_quantized_to_it():
    def stages(trained, **quantized):
        return make_recipe(FULL | {"stages": [{"finetune": {"quantization_aware": trained}}, {"quantize": quantized}]})

    assert stages({}, scheme="int8_static")
    assert stages({"scheme": "int4", "group_size": 32}, scheme="int4", group_size=32)
    with pytest.raises(RecipeError, match=r"stages\.0 trains for int8, and stages\.1 quantizes to int4"):
        stages({}, scheme="int4")
    with pytest.raises(RecipeError, match="another grid"):
        stages({"scheme": "int4", "group_size": 32}, scheme="int4")


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


def test_a_bad_range_is_told_once():
    with pytest.raises(RecipeError) as caught:
        make_recipe(
            {
                "task": "text-classification",
                "model": "m",
                "data": {"train": "a.csv"},
                "stages": ["finetune"],
                "search": {"space": {"stages.0.finetune.learning_rate": {"low": 1, "high": 1e-5}}},
            }
        )
    assert len(str(caught.value).splitlines()) == 1
    assert "from low up to high" in str(caught.value)
