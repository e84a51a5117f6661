"""What `moss check` foretells is what surgery gives; what it refuses, it refuses before any work and without torch."""

import csv
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest

import moss_rlhf
from moss_rlhf.checking import check, check_budgets
from moss_rlhf.errors import DataError, MachineError, ModelError, RecipeError, UserError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.model.limits import removable_share
from moss_rlhf.optimization import narrow, shorten
from moss_rlhf.recipe import make_recipe, with_values
from moss_rlhf.reporting.forecast import forecast_text
from moss_rlhf.tasks.loading import encoded, load

STAGES = [
    {"finetune": {"epochs": 1}},
    {"narrow": {"heads": 0.5, "feed_forward": 0.3, "multiple_of": 5}},
    {"shorten": {"remove": 1}},
    "quantize",
]
LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    place = tmp_path_factory.mktemp("data") / "reviews.csv"
    with place.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    return place


def _recipe(model, data, output, stages=STAGES):
    return make_recipe(
        {
            "task": "text-classification",
            "model": str(model),
            "data": {"train": str(data)},
            "stages": stages,
            "output": str(output),
        }
    )


# ModernBERT has no biases, ALBERT one block: theirs are foretold roughly, and ALBERT's can't be shortened
EXACT = ["bert", "roberta", "xlm-roberta", "electra", "distilbert", "deberta-v2"]


LANGUAGE = [name for name, family in FAMILIES.items() if family.kind != "encoder"]
OUR_TASKS = {"decoder": "text-generation", "encoder-decoder": "translation"}


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_family_that_does_not_fit_the_task_is_refused(family, tiny_checkpoint, data, tmp_path):
    with pytest.raises(
        ModelError, match=rf"coder \({family}\), and text-classification takes an encoder: .*set task: t"
    ):
        check(_recipe(tiny_checkpoint(family), data, tmp_path / "run"))


def _language_recipe(family, place, rows_of, folder, stages, **fields):
    task = OUR_TASKS[FAMILIES[family].kind]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)))
    data = {"train": str(folder / "rows.jsonl"), "validation": 0.2}
    recipe = {"task": task, "model": str(place), "data": data, "stages": stages, "output": str(folder / "run")}
    return make_recipe(recipe | fields)


@pytest.mark.parametrize("family", LANGUAGE)
def test_a_language_models_parameters_and_macs_are_those_of_the_surgery(family, tiny_checkpoint, rows_of, tmp_path):
    place = tiny_checkpoint(family)
    found = check(_language_recipe(family, place, rows_of, tmp_path, STAGES[:2]))
    model, rows = load(place), rows_of(OUR_TASKS[FAMILIES[family].kind])
    length = float(found.tokens["train"]["mean"])
    before = model.parameters, macs_per_token(model.dimensions, length)
    narrow(model, rows, heads=0.5, feed_forward=0.3, multiple_of=5)
    after = model.parameters, macs_per_token(model.dimensions, length)
    sinusoids = 2 * 64 * 32 if family == "marian" else 0  # which are no part of a pretrained file
    assert found.parameters + sinusoids == before[0]
    assert found.stages[0].parameters + sinusoids == before[0]
    # Llama's and T5's kind have no biases in their blocks: foretold to 2 % at these sizes
    assert found.stages[1].parameters + sinusoids == pytest.approx(after[0], rel=2e-2)
    assert [stage.macs_per_token for stage in found.stages] == pytest.approx([before[1], after[1]], rel=1e-12)


def test_a_language_models_rows_are_the_pieces_of_its_texts(tiny_checkpoint, rows_of, tmp_path):
    """A document of 199 tokens is four rows of at most 64, each but the first beginning with the last token before."""
    recipe = _language_recipe("gpt2", tiny_checkpoint("gpt2"), rows_of, tmp_path, ["finetune"])
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{n} " + "good " * 198}) + "\n" for n in range(10))
    )
    found = check(recipe)
    assert found.tokens["train"]["max_length"] == 64
    assert found.tokens["train"]["cut_share"] == 0
    model = load(tiny_checkpoint("gpt2"))
    tokens = 8 * 3 * (199 + 3)  # rows, epochs, tokens with the repeated ones
    assert found.stages[0].flops > 6 * tokens * macs_per_token(model.dimensions, 50)


REFUSED = [
    ("gpt2", {"export": ["onnx"]}, r"export: onnx does not serve a decoder\. Give \[ctranslate2\]"),
    ("bert", {"export": ["ctranslate2"]}, r"export: ctranslate2 does not serve an encoder\. Give \[onnx\]"),
    (
        "t5",
        {"export": ["ctranslate2"], "stages": [{"narrow": {"macs": 0.3}}]},
        r"export: ctranslate2: it holds one number of heads",
    ),
    (
        "gpt2",
        {"export": ["ctranslate2"], "stages": [{"quantize": {"scheme": "int8_static"}}]},
        "int8_static is for encoders",
    ),
    ("t5", {"stages": [{"shorten": {"remove": 3, "stack": "decoder"}}]}, r"can't remove 3 of 3 layers; .*Give 1 to 2"),
    ("t5", {"stages": [{"shorten": {"remove": 5}}]}, r"can't remove 5 of 6 layers; .*of each stack\. Give 1 to 4"),
    ("t5", {"stages": [{"shorten": {"remove": 3, "score": "angular"}}]}, r"of each stack\. Give 1 to 2"),
    ("llama", {"stages": [{"narrow": {"hidden": 0.1}}]}, r"hidden 0\.1 would remove nothing of 4 heads"),
    ("gemma", {"export": ["ctranslate2"], "stages": [{"narrow": {"hidden": 0.5}}]}, "the root of the hidden size"),
    ("marian", {"stages": ["trim_vocabulary"]}, None),  # a tiny Marian has a tokenizer.json
    ("gpt2", {"stages": [{"trim_vocabulary": {"corpora": ["none.txt"]}}]}, "there is no file none.txt"),
    ("gpt2", {"stages": ["shorten", {"finetune": {"distill": {"teacher": "t5"}}}]}, "t5 is an encoder-decoder, which"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_any_work(
    family, fields, message, tiny_checkpoint, rows_of, data, tmp_path
):
    place, stages = tiny_checkpoint(family), json.dumps(fields.get("stages", ["finetune"]))
    stages = json.loads(stages.replace('"t5"', json.dumps(str(tiny_checkpoint("t5")))))
    if family == "bert":
        recipe = _recipe(place, data, tmp_path / "run", stages).model_copy(update={"export": fields["export"]})
    else:
        recipe = _language_recipe(family, place, rows_of, tmp_path, stages, export=fields.get("export", []))
    if message is None:
        check(recipe)
    else:
        with pytest.raises(UserError, match=message):
            check(recipe)


@pytest.mark.parametrize("case", [*((family, None) for family in EXACT), ("roberta", LABELS)])
def test_parameters_and_macs_are_those_of_the_surgery(case, tiny_checkpoint, data, rows, tmp_path):
    place = tiny_checkpoint(*case)
    found = check(_recipe(place, data, tmp_path / "run"))
    model = load(place, labels=LABELS)
    length = found.tokens["train"]["mean"]
    actual = [(model.parameters, macs_per_token(model.dimensions, length))]
    narrow(model, rows, heads=0.5, feed_forward=0.3, multiple_of=5)
    actual.append((model.parameters, macs_per_token(model.dimensions, length)))
    shorten(model, rows, remove=1)
    actual += [(model.parameters, macs_per_token(model.dimensions, length))] * 2
    assert found.parameters == actual[0][0]
    assert [stage.parameters for stage in found.stages] == [parameters for parameters, _ in actual]
    assert [stage.macs_per_token for stage in found.stages] == pytest.approx([macs for _, macs in actual], rel=1e-12)
    assert actual[0][0] > actual[1][0] > actual[2][0]
    assert all(stage.memory_bytes > 4 * found.parameters for stage in found.stages)
    assert all(stage.seconds >= 0 for stage in found.stages)


def test_a_checkpoint_that_also_holds_a_pretraining_head_counts_only_what_is_kept(tiny_checkpoint, data, tmp_path):
    """As the hub's bert-base-uncased: a masked-language-model head, and position ids, which are no parameters."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    plain, place = tiny_checkpoint("bert"), tmp_path / "bert"
    shutil.copytree(plain, place)
    tensors = {f"bert.{name}": value for name, value in load_file(place / "model.safetensors").items()}
    tensors |= {
        "cls.predictions.transform.dense.weight": np.ones((32, 32), np.float32),
        "bert.embeddings.position_ids": np.arange(64)[None],
    }
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    found = check(_recipe(place, data, tmp_path / "run"))
    assert found.parameters == check(_recipe(plain, data, tmp_path / "run")).parameters
    assert found.parameters == load(place, labels=LABELS).parameters


def test_the_table_a_person_reads(tiny_checkpoint, data, tmp_path):
    text = forecast_text(check(_recipe(tiny_checkpoint("bert"), data, tmp_path / "run")))
    lines = text.splitlines()
    assert lines[0] == "labels: negative, positive"
    assert "54 rows" in lines[1]
    assert "6 rows" in lines[2]
    assert [line.split()[0] for line in lines if line.endswith("GB")] == ["finetune", "narrow", "shorten", "quantize"]
    assert lines[-1] == "ok"
    assert not (tmp_path / "run").exists()  # a check writes nothing


def test_texts_that_fill_the_model_are_counted_as_cut(tiny_checkpoint, tmp_path):
    data = tmp_path / "long.csv"
    data.write_text("text,label\n" + "".join(f"{'good ' * 100}{n},{n % 2}\n" for n in range(20)))
    found = check(_recipe(tiny_checkpoint("bert"), data, tmp_path / "run"))
    assert found.tokens["train"]["max_length"] == 64
    assert found.tokens["train"]["cut_share"] == 1


def test_a_check_imports_no_torch(tiny_checkpoint, data, tmp_path):
    recipe = _recipe(tiny_checkpoint("bert"), data, tmp_path / "run").model_dump(mode="json")
    place = tmp_path / "recipe.yaml"
    place.write_text(json.dumps(recipe))
    code = (
        "import sys; from moss_rlhf.cli import main; main(['check', sys.argv[1]]);"
        "print(*[name for name in ('torch', 'transformers', 'datasets', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, place], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("ok\n\n")


# --- layers, phases, the cache --------------------------------------------------------------------------------------


def _fails(stages, message, error, tiny_checkpoint, data, tmp_path):
    with pytest.raises(error, match=message):
        check(_recipe(tiny_checkpoint(), data, tmp_path / "run", stages))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (
            [{"finetune": {"phases": [{"train": ["head", "block.3"]}]}}],
            r"stages\.0\.finetune\.phases\.0\.train: there is no group 'block.3'. The groups are embeddings, block",
        ),
        (  # there was a block.2 before
            ["finetune", {"shorten": {"remove": 1}}, {"finetune": {"phases": [{"train": ["block.2"]}]}}],
            r"stages\.2\.finetune\.phases\.0\.train: there is no group 'block.2'",
        ),
        ([{"finetune": {"reinitialise": 4}}], r"reinitialise: 4 of 3 blocks"),
        ([{"finetune": {"layers": "by_damage"}}], "no stage before this one measures it"),
        (
            ["sensitivity", {"shorten": {"remove": 1}}, {"finetune": {"layers": "by_damage"}}],
            "measured before a shorten stage removed blocks",
        ),
    ],
)
def test_impossible_layers_are_refused(stages, message, tiny_checkpoint, data, tmp_path):
    _fails(stages, message, RecipeError, tiny_checkpoint, data, tmp_path)


def test_a_required_cache_must_be_possible(tiny_checkpoint, data, tmp_path):
    frozen = {"phases": [{"train": ["head"], "epochs": 2}]}
    required = frozen | {"cache": {"required": True, "bytes": 1000}}
    _fails([{"finetune": required}], "required, but their outputs take", MachineError, tiny_checkpoint, data, tmp_path)
    _fails(
        [{"finetune": {"cache": "required"}}], "no block stays frozen", MachineError, tiny_checkpoint, data, tmp_path
    )
    stages = [{"finetune": frozen | {"cache": {"bytes": 1000}}}]
    (note,) = check(_recipe(tiny_checkpoint(), data, tmp_path / "run", stages)).notes
    assert note.startswith("stages.0.finetune: frozen blocks will run at every step")


def test_a_forecast_knows_phases_and_the_cache(tiny_checkpoint, data, tmp_path):
    """Of six epochs two train the head alone: no backward through the blocks; cached, one forward instead of two."""

    def forecast(spec):
        return check(_recipe(tiny_checkpoint(), data, tmp_path / "run", [{"finetune": spec}])).stages[0]

    phases = [{"train": ["head"], "epochs": 2}, {"train": "all", "epochs": 4}]
    cached, plain = forecast({"phases": phases}), forecast({"phases": phases, "cache": "off"})
    everything, head = forecast({"epochs": 6}), forecast({"phases": phases[:1]})
    assert forecast({"epochs": 6, "unfreeze": "head_first"}).flops == cached.flops  # a third of the steps
    assert cached.flops < plain.flops < everything.flops
    assert plain.memory_bytes == everything.memory_bytes > head.memory_bytes
    # spared: two epochs' backward through the blocks, twice a forward each; and with the cache one of their forwards
    assert (everything.flops - plain.flops) == pytest.approx(4 * (plain.flops - cached.flops), rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"loss": {"class_weights": {"positiv": 2}}},
            r"stages\.0\.finetune\.loss\.class_weights: the data has no label",
        ),
        (
            {"quantization_aware": {"scheme": "int4", "group_size": 7}},
            r"stages\.0\.finetune\.quantization_aware\.group_size: 7 does not divide",
        ),
    ],
)
def test_options_of_fine_tuning_are_held_against_the_data_and_the_model(fields, words, tiny_checkpoint, data, tmp_path):
    with pytest.raises(RecipeError, match=words):
        check(_recipe(tiny_checkpoint("bert", LABELS), data, tmp_path / "run", [{"finetune": fields}]))


@pytest.mark.parametrize(
    ("family", "stage", "message"),
    [
        (
            "bert",
            {"finetune": {"packing": True}},
            r"finetune\.packing: text-classification has no documents",
        ),
        ("albert", {"finetune": {"mixup": 0.2}}, r"finetune\.mixup: albert's one block serves all layers"),
        ("bert", {"finetune": {"report_to": ["trackio"]}}, r"finetune\.report_to: trackio is not installed\. Run: pip"),
        ("bert", {"pretrain": {"objective": "spans"}}, r"pretrain\.objective: spans can't be learned by a bert"),
        (
            "bert",
            {"ensemble": {"finetune": {"loss": {"class_weights": {"zz": 2}}}}},
            r"ensemble\.finetune\.loss\.class_weights: the data has no label 'zz'",
        ),
        ("gpt2", {"finetune": {"mixup": 0.2}}, r"finetune\.mixup: text-generation has no classes to mix"),
        ("gpt2", {"finetune": {"loss": {"gamma": 2.0}}}, r"finetune\.loss\.gamma: text-generation foretells tokens"),
    ],
)
def test_what_a_stage_would_stumble_over_is_told_before_the_first(
    family, stage, message, tiny_checkpoint, rows_of, data, tmp_path
):
    if family == "gpt2":
        recipe = _language_recipe(family, tiny_checkpoint(family), rows_of, tmp_path, [stage])
    else:
        recipe = _recipe(tiny_checkpoint(family, LABELS), data, tmp_path / "run", [stage])
    with pytest.raises(UserError, match=message):
        check(recipe)


BLOCKS = [
    ("bert", [{"prune": {"sparsity": 0.0005}}], r"prune\.sparsity: a matrix of the blocks has 1536 weights, and spars"),
    ("bert", [{"prune": {"pattern": "3:7"}}], r"prune\.pattern: a matrix of the blocks is .* the pattern does not fit"),
    ("bert", [{"prune": {"pattern": "5x5", "sparsity": 0.5}}], "does not fit"),
    ("bert", [{"narrow": {"feed_forward": 0.9}}, {"prune": {"pattern": "8:16"}}], "is 32 x 8, which the pattern does"),
    ("bert", [{"narrow": {"hidden": 0.5}}, {"quantize": {"scheme": "int4", "group_size": 32}}], "rows of 16 weights"),
    (
        "bert",
        [{"narrow": {"heads": 0.01}}],
        r"heads 0\.01 would remove nothing of 4 heads, 48 neurons and a hidden size",
    ),
    ("bert", [{"shorten": {"stack": "decoder"}}], "the model has no decoder, only one encoder"),
    ("albert", ["shorten"], r"stages\.0\.shorten: albert: its layers share one block"),
    ("bert", [{"narrow": {"macs": 0.3}}, {"shorten": {"how": "merge_average"}}], r"shorten\.how: .*Put shorten before"),
    ("bert", [{"narrow": {"macs": 0.99}}], r"narrow: macs 0\.99 can't be removed: with one head and 8 neurons"),
    ("bert", [{"narrow": {"parameters": 0.99}}], r"narrow: parameters 0\.99 can't be removed"),
]


@pytest.mark.parametrize(("family", "stages", "message"), BLOCKS)
def test_what_the_blocks_can_not_take_is_told_before_any_work(family, stages, message, tiny_checkpoint, data, tmp_path):
    with pytest.raises(RecipeError, match=message):
        check(_recipe(tiny_checkpoint(family, LABELS), data, tmp_path / "run", stages))


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("budget", ["macs", "parameters"])
def test_check_and_narrow_draw_the_same_line(
    budget, family, tiny_model, tiny_checkpoint, rows_of, data, rows, tmp_path
):
    """A share just below what can go passes both, one just above neither."""
    model = tiny_model(family)
    sample = rows if family == "bert" else rows_of(model.task)
    length = float(np.mean(encoded(model, sample)["length"]))
    most = removable_share(model.dimensions, budget, 8, length)
    with pytest.raises(ModelError, match=f"narrow: {budget} .* can't be removed"):
        narrow(tiny_model(family), sample, **{budget: most + 1e-6}, repair=False)
    narrow(model, sample, **{budget: most - 1e-6}, repair=False)
    if family == "bert":
        recipe = _recipe(tiny_checkpoint(family, LABELS), data, tmp_path / "run", [{"narrow": {budget: 0.9}}])
    else:
        recipe = _language_recipe(family, tiny_checkpoint(family), rows_of, tmp_path, [{"narrow": {budget: 0.9}}])
    for share, passes in ((most - 1e-6, True), (most + 1e-6, False)):
        asked = with_values(recipe, {f"stages.0.narrow.{budget}": share})
        with nullcontext() if passes else pytest.raises(RecipeError, match="can't be removed"):
            check_budgets(asked, length)


def test_a_small_budget_is_spent_although_an_even_share_of_it_is_less_than_a_unit(tiny_checkpoint, data, tmp_path):
    check(_recipe(tiny_checkpoint("bert", LABELS), data, tmp_path / "run", [{"narrow": {"macs": 0.02}}]))


def test_a_narrower_hidden_size_is_foretold(tiny_checkpoint, data, rows, tmp_path):
    place = tiny_checkpoint("bert", LABELS)
    found = check(_recipe(place, data, tmp_path / "run", [{"narrow": {"hidden": 0.5}}])).stages[0]
    model = load(place)
    narrow(model, rows, hidden=0.5)
    assert model.anatomy.hidden_size == 16
    assert found.parameters == pytest.approx(model.parameters, rel=0.02)
    assert found.macs_per_token == pytest.approx(macs_per_token(model.dimensions, 6), rel=0.1)


def test_windows_that_the_runtime_leaves_out_are_refused(tiny_checkpoint, rows_of, tmp_path):
    place = tmp_path / "qwen2"
    shutil.copytree(tiny_checkpoint("qwen2"), place)
    config = json.loads((place / "config.json").read_text())
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0, "layer_types": None}
    (place / "config.json").write_text(json.dumps(config | windows))
    recipe = _language_recipe("qwen2", place, rows_of, tmp_path, ["finetune"], export=["ctranslate2"])
    with pytest.raises(
        RecipeError, match=r"export: ctranslate2: its converter leaves out the sliding windows of a qwen2"
    ):
        check(recipe)
    with pytest.raises(ModelError, match="leaves out the sliding windows of a qwen2"):
        moss_rlhf.export(load(place), tmp_path / "out", format="ctranslate2")


PARTS = [
    ({"adapter": {"targets": ["qkv"]}}, r"adapter\.targets: no matrix of a block is called 'qkv'; .*query"),
    ({"adapter": {"targets": ["self.query"]}}, None),
    ({"distill": {"attention": 1, "relation_heads": 7}}, r"relation_heads: 7 does not divide 16, the features .*of 16"),
    ({"distill": {"attention": 1, "relation_heads": 4}}, None),
]


@pytest.mark.parametrize(("fields", "message"), PARTS)
def test_what_a_training_names_is_there_after_narrowing(fields, message, tiny_checkpoint, data, tmp_path):
    recipe = _recipe(
        tiny_checkpoint("bert", LABELS), data, tmp_path / "run", [{"narrow": {"heads": 0.5}}, {"finetune": fields}]
    )
    with nullcontext() if message is None else pytest.raises(RecipeError, match=message):
        check(recipe)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("search", {"space": {"stages.0.finetune.epochs": [1, 2]}, "rows": 1}),
        ("data.collect", {"count": 1, "keywords": ["good"], "diversity": 0}),
    ],
)
def test_fewer_rows_than_classes_are_refused(field, value, tiny_checkpoint, data, tmp_path):
    recipe = with_values(_recipe(tiny_checkpoint("bert", LABELS), data, tmp_path / "run"), {field: value})
    with pytest.raises(RecipeError, match=r"(search\.rows|data\.collect\.count): 1 is less than a row of each of 2 cl"):
        check(recipe)


def test_a_teachers_labels_have_the_same_order(tiny_checkpoint, data, tmp_path):
    stage = {"finetune": {"distill": {"teacher": str(tiny_checkpoint("bert", LABELS[::-1]))}}}
    with pytest.raises(ModelError, match="Give one of the same labels in the same order"):
        check(_recipe(tiny_checkpoint("bert"), data, tmp_path / "run", [stage]))


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("stages.0.finetune.phases", [{"train": ["block.7"]}], "there is no group 'block.7'"),
        ("stages.0.finetune.reinitialise", 4, "4 of 3 blocks"),
        ("stages.2.shorten.remove", 3, "can't remove 3 of 3 layers"),
    ],
)
def test_each_value_of_a_search_is_checked_against_the_model(field, value, why, tiny_checkpoint, data, tmp_path):
    recipe = _recipe(tiny_checkpoint("bert"), data, tmp_path / "run")
    searching = with_values(recipe, {"search": {"space": {field: [value]}, "trials": 1}})
    with pytest.raises(RecipeError, match=rf"search\.space\.{field}: .* can't be tried: .*{why}"):
        check(searching)


@pytest.mark.parametrize("field", ["model", "data.validation", "data.limit.validation"])
def test_what_a_search_may_not_touch(field, tiny_checkpoint, data, tmp_path):
    recipe = _recipe(tiny_checkpoint("bert"), data, tmp_path / "run")
    with pytest.raises(RecipeError, match=f"{field} is not to be searched"):
        with_values(recipe, {"search": {"space": {field: [0.1]}}})


def test_r_drop_is_foretold_to_cost_twice(tiny_checkpoint, data, tmp_path):
    stages = [{"finetune": {"loss": {"r_drop": strength}}} for strength in (0, 1)]
    once, twice = check(_recipe(tiny_checkpoint("bert", LABELS), data, tmp_path / "run", stages)).stages
    assert 1.5 * once.flops < twice.flops < 2 * once.flops


def test_an_ensemble_costs_its_members_and_the_one(tiny_checkpoint, data, tmp_path):
    """Each member trains and answers the 60 rows of train and validation; then one more training."""
    place, settings = tiny_checkpoint("bert"), {"epochs": 2}
    alone = check(_recipe(place, data, tmp_path / "run", [{"finetune": settings}]))
    spec = {"members": 3, "finetune": settings}
    found = check(_recipe(place, data, tmp_path / "run", [{"ensemble": spec}])).stages[0]
    answers = 2 * found.macs_per_token * alone.tokens["train"]["mean"] * 60
    assert found.flops == pytest.approx(4 * alone.stages[0].flops + 3 * answers)
    assert found.memory_bytes == alone.stages[0].memory_bytes + 3 * 4 * found.parameters
    folds = check(_recipe(place, data, tmp_path / "run", [{"ensemble": spec | {"by": "folds"}}])).stages[0]
    assert folds.flops < found.flops


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ({"finetune": {"metric": "f1"}}, RecipeError, r"stages\.0\.ensemble\.finetune\.metric: .* no metric 'f1'"),
        ({"finetune": {"reinitialise": 9}}, RecipeError, r"stages\.0\.ensemble\.finetune\.reinitialise: 9 of 3 blocks"),
        ({"finetune": {"layers": "by_damage"}}, RecipeError, r"stages\.0\.ensemble\.finetune\.layers: by_damage"),
        ({"finetune": {"cache": "required"}}, MachineError, r"stages\.0\.ensemble\.finetune\.cache: required, but"),
        ({"by": "folds", "members": 40}, DataError, r"stages\.0\.ensemble\.members: 40 folds, but .* 'negative', and"),
    ],
)
def test_what_an_ensemble_can_not_be(spec, error, message, tiny_checkpoint, data, tmp_path):
    with pytest.raises(error, match=message):
        check(_recipe(tiny_checkpoint("bert"), data, tmp_path / "run", [{"ensemble": spec}]))


@pytest.mark.parametrize(
    ("collect", "error", "message"),
    [
        ({"like": "nowhere.csv"}, DataError, r"^data\.collect\.like: there is no file nowhere\.csv"),
        ({"like": "columns.csv"}, DataError, r"columns\.csv: there is no column 'text'"),
        ({"perplexity": "bert"}, ModelError, r"^data\.collect\.perplexity: .* is a bert for other tasks"),
    ],
)
def test_what_can_not_be_collected_by(collect, error, message, data, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "columns.csv").write_text("body,label\na,b\n", "utf-8")
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    given = {name: str(tiny_checkpoint(value)) if value == "bert" else value for name, value in collect.items()}
    values["data"]["collect"] = {"count": 5, **given}
    with pytest.raises(error, match=message):
        check(make_recipe(values))


def test_a_search_on_fewer_rows_can_not_collect(data, tiny_checkpoint, tmp_path):
    pytest.importorskip("optuna")
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    values["data"]["collect"] = {"count": 20, "keywords": ["good"]}
    values["search"] = {"space": {"stages.0.finetune.epochs": [1, 2]}, "trials": 2, "rows": 10}
    with pytest.raises(RecipeError, match=r"^search\.rows: 10, but data\.collect chooses .*\.count the smaller"):
        check(make_recipe(values))


def test_stages_are_foretold_for_the_texts_collected(data, tiny_checkpoint, tmp_path):
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    whole = check(make_recipe(values))
    values["data"]["collect"] = {"count": 5, "keywords": ["good"]}
    found = check(make_recipe(values))
    assert "data.collect has not been done yet: rows are those before it, times those of 5 rows." in found.notes
    assert found.data.facts == whole.data.facts
    assert sum(stage.seconds for stage in found.stages) < sum(stage.seconds for stage in whole.stages)


def test_more_folds_of_cleaning_than_rows_of_a_class(data, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("moss_rlhf.data.cleaning.clean.find_spec", lambda name: name)
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    values["data"] |= {"clean": {"label_errors": "drop", "label_method": "confident", "folds": 12}, "limit": 20}
    with pytest.raises(DataError, match=r"^data\.clean\.folds: 12, but train has only \d+ of the class"):
        check(make_recipe(values))
    values["data"]["clean"]["label_method"] = "neighbours"
    check(make_recipe(values))


def test_what_data_asks_for_is_checked_before_work(data, tiny_checkpoint, tmp_path, monkeypatch):
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    values["data"] |= {"clean": {"language": "drop", "empty": "drop"}, "balance": "undersample"}
    found = check(make_recipe(values))
    assert "data.clean has not been done yet: rows are those before it." in found.notes
    assert "data.balance has not been done yet: rows are those before it." in found.notes
    monkeypatch.setattr("moss_rlhf.data.cleaning.clean.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"data\.clean\.language: needs the package py3langid"):
        check(make_recipe(values))
