"""`model` as sizes and texts: a recipe that begins from nothing."""

import csv

import pytest

from moss_rlhf.checking import check, source_of
from moss_rlhf.errors import DataError, ModelError, RecipeError
from moss_rlhf.model.config import read_config
from moss_rlhf.model.locate import read_header
from moss_rlhf.pipeline import run
from moss_rlhf.recipe import make_recipe, with_values

pytestmark = pytest.mark.usefixtures("memory_not_measured")
SIZES = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
SMALL = {"batch_size": 8, "max_length": 24, "learning_rate": 1e-3}


@pytest.fixture
def recipe(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "domain.txt").write_text("\n".join(row["text"] for row in rows))
    return make_recipe(
        {
            "task": "text-classification",
            "model": {"config": SIZES, "texts": str(tmp_path / "domain.txt"), "vocabulary": 200},
            "data": {"train": str(tmp_path / "train.csv")},
            "stages": [{"pretrain": SMALL}, {"finetune": {"epochs": 1}}],
            "evaluate": {"speed_seconds": 0.1, "speed_rows": 4, "batch_sizes": [1], "resamples": 200},
            "output": str(tmp_path / "run"),
        }
    )


def test_a_run_from_nothing(recipe, tmp_path):
    foretold = check(recipe)
    report = run(recipe)
    config = read_config(tmp_path / "run" / "model")
    assert {name: config[name] for name in SIZES} == SIZES
    assert report["after"]["parameters"] == foretold.parameters
    pretrained = report["stages"][0]["facts"]
    assert pretrained["after"]["perplexity"] < pretrained["before"]["perplexity"]
    assert "<title>bert from scratch" in (tmp_path / "run" / "report.html").read_text()


def test_it_is_made_once_and_named_by_what_decides_it(recipe, tmp_path):
    place = source_of(recipe)
    made = (place / "model.safetensors").stat().st_mtime_ns
    assert source_of(recipe) == place and (place / "model.safetensors").stat().st_mtime_ns == made
    assert not any(name.startswith("classifier") for name in read_header(place / "model.safetensors"))
    others = [with_values(recipe, change) for change in ({"seed": 1}, {"model.vocabulary": 150})]
    assert len({place, *map(source_of, others)}) == 3
    (tmp_path / "domain.txt").write_text("other words altogether\nand more of them\n")
    assert source_of(recipe) != place


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"model.config.hiden_size": 32},
            ModelError,
            r"model\.config: a bert has no hiden_size; did you mean .hidden_size.",
        ),
        ({"model.config.num_hidden_layers": 0}, ModelError, r"model\.config: num_hidden_layers is 0; give at least 1"),
        ({"model.config.hidden_size": 33}, ModelError, r"model\.config: no bert of such sizes: .*33.* not a multiple"),
        ({"model.config.hidden_size": "wide"}, ModelError, r"model\.config: no bert of such sizes: .*hidden_size"),
        ({"model.config.model_type": "brt"}, ModelError, "'brt' is not known"),
        (
            {"model.config.model_type": "gpt2", "model.vocabulary": 400},
            ModelError,
            "model: the model from scratch is a decoder",
        ),
        ({"model.texts": "none.txt"}, DataError, r"model\.texts: there is no file none\.txt"),
        ({"model.vocabulary": 9}, DataError, r"model\.vocabulary: 9 tokens don't hold"),
    ],
)
def test_what_check_finds(change, kind, message, recipe):
    with pytest.raises(kind, match=message):
        check(with_values(recipe, change))


def test_an_unknown_field_is_named_where_the_user_wrote_it(recipe):
    with pytest.raises(RecipeError, match=r"model: unknown field 'sizes'; "):
        with_values(recipe, {"model": {"sizes": SIZES, "texts": "domain.txt"}})
