"""What the user asks for: typed, frozen, unknown keys refused. Imports no torch."""

from moss_rlhf.recipe.reading import apply_override, make_recipe, parse_yaml, read_recipe, recipe_values, recipe_yaml
from moss_rlhf.recipe.schema import DataSpec, EvaluateSpec, Recipe, SplitLayout, stages_before_compression
from moss_rlhf.recipe.stages import (
    DistillSpec,
    EarlyStoppingSpec,
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    stage_kind,
    stage_spec,
)

__all__ = [
    "DataSpec",
    "DistillSpec",
    "EarlyStoppingSpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "NarrowSpec",
    "PruneSpec",
    "QuantizeSpec",
    "Recipe",
    "SensitivitySpec",
    "ShortenSpec",
    "SplitLayout",
    "apply_override",
    "make_recipe",
    "parse_yaml",
    "read_recipe",
    "recipe_values",
    "recipe_yaml",
    "stage_kind",
    "stage_spec",
    "stages_before_compression",
]
