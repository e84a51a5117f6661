"""What the user asks for: typed, frozen, unknown keys refused. Imports no torch."""

from moss_rlhf.recipe.compression import (
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
)
from moss_rlhf.recipe.data import DataSpec, SplitLayout
from moss_rlhf.recipe.finetuning import DistillSpec, EarlyStoppingSpec, FinetuneSpec
from moss_rlhf.recipe.reading import apply_override, make_recipe, parse_yaml, read_recipe, recipe_values, recipe_yaml
from moss_rlhf.recipe.schema import EvaluateSpec, Recipe, stages_before_compression
from moss_rlhf.recipe.stages import stage_kind, stage_spec

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
    "TrimVocabularySpec",
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
