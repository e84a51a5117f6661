from pathlib import Path

import pytest

from moss_rlhf.errors import RecipeError
from moss_rlhf.recipe import apply_override, make_recipe, parse_yaml, read_recipe, recipe_values, recipe_yaml

RECIPE = """
task: text-classification
model: org/name
data: {train: train.csv, labels: {1: 0, yes: no, 010: 1:30}}
stages:
  - finetune: {learning_rate: 5e-5, epochs: 2}
  - quantize
"""


def minimal(**fields):
    return {
        "task": "text-classification",
        "model": "org/name",
        "data": {"train": "train.csv"},
        "stages": [{"finetune": {}}],
    } | fields


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5), ("1E3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-2.5e+1", -25.0), ("1_000", 1000), ("-3", -3),
        ("yes", "yes"), ("No", "No"), ("on", "on"), ("True", "True"), ("1:30", "1:30"), ("010", "010"),
        ("0x1f", "0x1f"), ("2024-05-01", "2024-05-01"), ("2024-13-45", "2024-13-45"), ("1e", "1e"), ("1.2.3", "1.2.3"),
        ("~", None), ("", None), ("'1'", "1"), ("e5", "e5"), ("=", "="),
    ],
)  # fmt: skip
def test_a_scalar_means_what_it_looks_like(text, value):
    found = parse_yaml(f"key: {text}", "here")["key"]
    assert found == value
    assert type(found) is type(value)


def test_label_names_stay_text_and_numbers_become_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("\ufeff" + RECIPE, encoding="utf-8")  # a BOM, as some editors write
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert recipe.data.labels == {"1": "0", "yes": "no", "010": "1:30"}
    assert recipe.stages[0].finetune.learning_rate == 5e-5
    assert recipe.stages[1].quantize.scheme == "int8"


def test_what_is_written_reads_back_the_same():
    labels = {"1": "yes", "no": "010", "true": "1:30", "2024-05-01": "5e-5", "好": "坏", "~": "null", "": "a: b"}
    recipe = make_recipe(minimal(data={"train": "train.csv", "labels": labels}, seed=2**32 - 1))
    assert make_recipe(parse_yaml(recipe_yaml(recipe), "again")) == recipe
    assert make_recipe(recipe_values(recipe)) == recipe


def test_merged_mappings_are_merged_and_what_stands_beside_wins():
    values = parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "here")
    assert values["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\nmodel: a\nseed: 2", ["here", "line 3", "'seed'", "twice"]),
        ("a:\n  - {x: 1, x: 1}", ["here", "line 2", "'x'", "twice"]),
        ("1: a\n1: b", ["1", "twice"]),
        ("a: [1", ["here", "not YAML", "line 1"]),
        ("- a\n- b", ["here", "mapping", "list"]),
        ("", ["here", "mapping", "NoneType"]),
        ("a: !!python/object:os.system x", ["not YAML", "python/object"]),
        ("{[1]: 2}", ["not YAML", "unhashable"]),
        ("a: " + "9" * 5000, ["not YAML", "digits"]),
        ("a: \x00", ["not YAML"]),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place(text, words):
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "here")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("content", "word"), [(None, "No such file"), (b"\xff\xfe\x00", "UTF-8"), ("folder", "directory")]
)
def test_a_file_that_can_not_be_read(tmp_path, content, word):
    place = tmp_path / "recipe.yaml"
    if content == "folder":
        place.mkdir()
    elif content is not None:
        place.write_bytes(content)
    with pytest.raises(RecipeError, match=word) as caught:
        read_recipe(place)
    assert str(place) in str(caught.value)


# --- --set -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("seed=3", ["seed"], 3),
        ("stages.0.finetune.learning_rate=5e-5", ["stages", 0, "finetune", "learning_rate"], 5e-5),
        ("stages.0.finetune.early_stopping.patience=4", ["stages", 0, "finetune", "early_stopping", "patience"], 4),
        ("stages.1.quantize.scheme=int8", ["stages", 1, "quantize", "scheme"], "int8"),  # `- quantize` as a word
        ("stages.1={prune: {sparsity: 0.5}}", ["stages", 1], {"prune": {"sparsity": 0.5}}),
        ("data.train.header=false", ["data", "train"], {"file": "train.csv", "header": "false"}),
        ("data.labels={1: spam}", ["data", "labels"], {1: "spam"}),
        ("export=[onnx]", ["export"], ["onnx"]),
        ("data.test=", ["data", "test"], None),
        ("output=a=b", ["output"], "a=b"),
        ("data.limit.train=5", ["data", "limit", "train"], 5),
    ],
)
def test_an_override_sets_one_field(override, path, value):
    values = parse_yaml(RECIPE, "here")
    apply_override(values, override)
    for name in path:
        values = values[name]
    assert values == value


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("seed", "FIELD=VALUE"),
        ("=3", "FIELD=VALUE"),
        ("stages.9.finetune.epochs=3", "no position in a list of 2"),
        ("stages.-1.finetune.epochs=3", "no position"),
        ("stages.².finetune.epochs=3", "no position"),
        ("stages.last=3", "no position"),
        ("seed.x=3", "no fields"),
        ("model.x.y=3", "no fields"),
        ("seed=[1", "not YAML"),
        ("data={train: a, train: b}", "twice"),
    ],
)
def test_a_wrong_override_says_which_and_why(override, word):
    with pytest.raises(RecipeError, match=word) as caught:
        apply_override(parse_yaml("seed: 1\nmodel: a\nstages: [finetune, quantize]", "here"), override)
    assert f"--set {override}" in str(caught.value)


def test_a_misspelt_override_is_refused_like_a_misspelt_field(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(RecipeError, match="'epoch'; did you mean 'epochs'"):
        read_recipe(tmp_path / "recipe.yaml", ["stages.0.finetune.epoch=3"])


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "where", "hint"),
    [
        ({"sed": 1}, "the recipe", "'seed'"),
        ({"data": {"train": "a", "limt": 1}}, "data", "'limit'"),
        ({"data": {"train": {"file": "a", "heder": True}}}, "data.train", "'header'"),
        ({"data": {"train": "a", "validation": {"file": "a", "colums": {}}}}, "data.validation", "'columns'"),
        ({"stages": [{"finetune": {"epocs": 3}}]}, "stages.0.finetune", "'epochs'"),
        ({"stages": [{"narow": {"heads": 0.5}}]}, "stages.0", "'narrow'"),
        ({"stages": ["finetune", "quantise"]}, "stages.1", "'quantize'"),
        ({"stages": [{"finetune": {"early_stopping": {"patiense": 1}}}]}, "stages.0.finetune.early_stopping",
         "'patience'"),
        ({"stages": [{"finetune": {"distill": {"techer": "parent"}}}]}, "stages.0.finetune.distill", "'teacher'"),
        ({"evaluate": {"batch_size": [1]}}, "evaluate", "'batch_sizes'"),
    ],
)  # fmt: skip
def test_an_unknown_key_at_any_level_comes_with_the_nearest_known_one(fields, where, hint):
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal(**fields), "my.yaml")
    assert str(caught.value).startswith(f"my.yaml: {where}: unknown")
    assert f"did you mean {hint}" in str(caught.value)
    assert "\n" not in str(caught.value)


_PRUNE_SHARE = "stages.0.prune: give sparsity, such as 0.5, or a pattern N:M, which says it by itself."


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"stages": [{"narrow": {"heads": 1.0}}]},
         "stages.0.narrow.heads: 1.0 can't be used; it must be less than 1."),
        ({"stages": [{"narrow": {}}]},
         "stages.0.narrow: removes nothing; give heads or feed_forward a share above 0."),
        ({"stages": [{"prune": {}}]}, _PRUNE_SHARE),
        ({"stages": []}, "stages: [] can't be used; it must have at least 1 item."),
        ({"stages": [{"finetune": {}, "quantize": {}}]},
         "stages.0: a stage is one kind with its fields, such as finetune: {epochs: 3}."),
        ({"stages": ["quantize", "finetune"]},
         "stages: stages.0 is quantize, and finetune follows it; move quantize to the end."),
        ({"stages": [{"finetune": {"epochs": "true"}}]},
         "stages.0.finetune.epochs: 'true' can't be used; it must be a whole number."),
        ({"data": {"train": 3}}, "data.train: 3 can't be used; it must be text or be a mapping of fields."),
        ({"data": {"train": {"file": "a", "hub": "b"}}},
         "data.train: give one of 'file', 'files' and 'hub', not several and not none."),
        ({"data": {"train": "a", "validation": 0}},
         "data.validation: 0 can't be used; it must be greater than 0 or be text or be a mapping of fields."),
        ({"data": {"train": "a", "max_length": "autoo"}},
         "data.max_length: 'autoo' can't be used; it must be 'auto' or be a whole number."),
        (
            {"export": ["onyx"]},
            "export.0: 'onyx' can't be used; it must be 'onnx', 'ctranslate2' or 'compressed-tensors'.",
        ),
        ({"evaluate": {"confidence": float("nan")}},
         "evaluate.confidence: nan can't be used; it must be a finite number."),
        ({"seed": 2**32}, "seed: 4294967296 can't be used; it must be less than 4294967296."),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_with_its_place_and_rule(fields, line):
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal(**fields))
    assert str(caught.value) == f"recipe: {line}"


def test_every_fault_has_its_line():
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal(seed=-1, task="poetry", stages=[{"finetune": {"epochs": 0, "warmup": 1}}]))
    assert [line.split(":")[1].strip() for line in str(caught.value).splitlines()] == [
        "task", "stages.0.finetune.epochs", "stages.0.finetune.warmup", "seed",
    ]  # fmt: skip


def test_the_recipes_of_the_repository_are_valid():
    recipes = list((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
    assert recipes
    assert all(read_recipe(path).stages for path in recipes)


def test_phases_say_how_many_epochs_a_stage_has_and_read_back_the_same():
    phases = [{"train": ["head", "block.1"], "epochs": 2, "learning_rate": "1e-3"}, {"train": "all"}]
    recipe = make_recipe(minimal(stages=[{"finetune": {"phases": phases, "cache": {"dtype": "float16"}}}]))
    assert recipe.stages[0].finetune.epochs == 3
    assert make_recipe(parse_yaml(recipe_yaml(recipe), "again")) == recipe
    assert make_recipe(minimal(stages=[{"finetune": {"phases": [{"epochs": 7}]}}])).stages[0].finetune.epochs == 7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"phases": [{"epochs": 2}], "epochs": 3},
            "finetune: epochs: 3, but the phases have 2 together; leave",
        ),
        ({"phases": [{}], "unfreeze": "gradual"}, "unfreeze: gradual and phases both say what trains when; give one"),
        ({"layers": "by_damage", "layer_decay": 0.9}, "by_damage and layer_decay both set the rates of layers"),
        ({"phases": [{"train": []}]}, "stages.0.finetune.phases.0.train"),
        ({"phases": [{"learning_rate": 0}]}, "stages.0.finetune.phases.0.learning_rate"),
        ({"phases": [{"trian": "all"}]}, "stages.0.finetune.phases.0: unknown field 'trian'; did you mean 'train'"),
        ({"phases": []}, "stages.0.finetune.phases"),
        ({"unfreeze": "head-first"}, "stages.0.finetune.unfreeze"),
        (
            {"cache": "always"},
            "finetune.cache: 'always' can't be used; it must be 'auto', 'off' or 'required' or be",
        ),
        ({"cache": {"bytes": 0}}, "recipe: stages.0.finetune.cache.bytes: 0 can't be used"),
        ({"reinitialise": -1}, "stages.0.finetune.reinitialise"),
    ],
)
def test_layers_that_can_not_be_are_refused_with_their_place(fields, message):
    with pytest.raises(RecipeError) as caught:
        make_recipe(minimal(stages=[{"finetune": fields}]))
    assert message in str(caught.value)
