"""Every recipe that comes with the package is one, as the schema of its day has it."""

from pathlib import Path

import pytest

from moss_rlhf.recipe import make_recipe, read_recipe, recipe_values

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
EXPORTS = {"text-classification": ["onnx"], "text-generation": ["ctranslate2"], "translation": ["ctranslate2"]}


@pytest.mark.parametrize("place", RECIPES, ids=lambda place: place.stem)
def test_it_parses_and_ships_what_its_task_is_served_by(place):
    recipe = read_recipe(place)
    assert recipe.export == EXPORTS[recipe.task]
    assert make_recipe(recipe_values(recipe)) == recipe


def test_there_is_one_for_every_task():
    assert {read_recipe(place).task for place in RECIPES} == set(EXPORTS)
