"""What the user asks for: typed, frozen, unknown keys refused. Imports no torch."""

from moss_rlhf.recipe.compression import NarrowSpec, PruneSpec, QuantizeSpec, SensitivitySpec, ShortenSpec
from moss_rlhf.recipe.data import DataSpec, SplitLayout
from moss_rlhf.recipe.ensemble import EnsembleSpec
from moss_rlhf.recipe.finetuning import CacheSpec, DistillSpec, EarlyStoppingSpec, FinetuneSpec, PhaseSpec
from moss_rlhf.recipe.reading import (
    apply_override,
    make_recipe,
    parse_yaml,
    read_recipe,
    recipe_values,
    recipe_yaml,
    with_values,
)
from moss_rlhf.recipe.schema import EvaluateSpec, Recipe, stages_before_compression
from moss_rlhf.recipe.search import RangeSpec, SearchSpec
from moss_rlhf.recipe.stages import stage_kind, stage_spec

__all__ = [
    "CacheSpec",
    "DataSpec",
    "DistillSpec",
    "EarlyStoppingSpec",
    "EnsembleSpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "NarrowSpec",
    "PhaseSpec",
    "PruneSpec",
    "QuantizeSpec",
    "RangeSpec",
    "Recipe",
    "SearchSpec",
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
    "with_values",
]
