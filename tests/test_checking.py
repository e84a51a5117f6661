"""What `moss check` foretells is what surgery gives; what it refuses, it refuses before any work and without torch."""

import csv
import json
import shutil
import subprocess
import sys

import pytest

from moss_rlhf.checking import check
from moss_rlhf.errors import MachineError, ModelError
from moss_rlhf.model.anatomy import FAMILIES
from moss_rlhf.model.cost import macs_per_token
from moss_rlhf.optimization import narrow, shorten
from moss_rlhf.recipe import make_recipe
from moss_rlhf.reporting.forecast import forecast_text
from moss_rlhf.tasks.loading import load

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


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.kind != "encoder"])
def test_a_recipe_for_what_is_no_encoder_is_refused(family, tiny_checkpoint, data, tmp_path):
    with pytest.raises(ModelError, match="recipes classify texts with encoders"):
        check(_recipe(tiny_checkpoint(family), data, tmp_path / "run"))


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


def test_what_data_asks_for_is_checked_before_work(data, tiny_checkpoint, tmp_path, monkeypatch):
    values = _recipe(tiny_checkpoint(), data, tmp_path / "run").model_dump(mode="json")
    values["data"] |= {"clean": {"language": "drop", "empty": "drop"}, "balance": "undersample"}
    found = check(make_recipe(values))
    assert "data.clean has not been done yet: rows are those before it." in found.notes
    assert "data.balance has not been done yet: rows are those before it." in found.notes
    monkeypatch.setattr("moss_rlhf.data.cleaning.clean.find_spec", lambda name: None)
    with pytest.raises(MachineError, match=r"data\.clean\.language: needs the package py3langid"):
        check(make_recipe(values))
