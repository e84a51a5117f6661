"""What the user asks for: typed, frozen, unknown keys refused. Imports no torch."""

from moss_rlhf.recipe.reading import apply_override, make_recipe, parse_yaml, read_recipe, recipe_values, recipe_yaml
from moss_rlhf.recipe.schema import (
    DataSpec,
    DistillSpec,
    EarlyStoppingSpec,
    EvaluateSpec,
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    ShortenSpec,
    SplitLayout,
    StageSpec,
    stage_kind,
    stage_spec,
    stages_before_compression,
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
    "ShortenSpec",
    "SplitLayout",
    "StageSpec",
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
