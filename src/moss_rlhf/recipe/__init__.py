"""What the user asks for: typed, frozen, unknown keys refused. Imports no torch."""

from moss_rlhf.recipe.augment import RATES, AugmentSpec, BackTranslationSpec, MaskedLMSpec
from moss_rlhf.recipe.clean import CleanSpec
from moss_rlhf.recipe.collect import CollectSpec
from moss_rlhf.recipe.compression import (
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
)
from moss_rlhf.recipe.data import DataSpec, SplitLayout
from moss_rlhf.recipe.ensemble import EnsembleSpec
from moss_rlhf.recipe.finetuning import (
    AdapterSpec,
    CacheSpec,
    DistillSpec,
    EarlyStoppingSpec,
    FinetuneSpec,
    LossSpec,
    MovementSpec,
    OptimizerSpec,
    PhaseSpec,
    QuantizationAwareSpec,
    ScheduleSpec,
)
from moss_rlhf.recipe.pretraining import PretrainSpec
from moss_rlhf.recipe.reading import (
    apply_override,
    make_recipe,
    parse_yaml,
    read_recipe,
    recipe_values,
    recipe_yaml,
    with_values,
)
from moss_rlhf.recipe.schema import EvaluateSpec, Recipe, settle_distillation, stages_before_compression
from moss_rlhf.recipe.scratch import ScratchSpec
from moss_rlhf.recipe.search import RangeSpec, SearchSpec, candidates
from moss_rlhf.recipe.stages import stage_kind, stage_spec

__all__ = [
    "RATES",
    "AdapterSpec",
    "AugmentSpec",
    "BackTranslationSpec",
    "CacheSpec",
    "CleanSpec",
    "CollectSpec",
    "DataSpec",
    "DistillSpec",
    "EarlyStoppingSpec",
    "EnsembleSpec",
    "EvaluateSpec",
    "FinetuneSpec",
    "LossSpec",
    "MaskedLMSpec",
    "MovementSpec",
    "NarrowSpec",
    "OptimizerSpec",
    "PhaseSpec",
    "PretrainSpec",
    "PruneSpec",
    "QuantizationAwareSpec",
    "QuantizeSpec",
    "RangeSpec",
    "Recipe",
    "ScheduleSpec",
    "ScratchSpec",
    "SearchSpec",
    "SensitivitySpec",
    "ShortenSpec",
    "SplitLayout",
    "TrimVocabularySpec",
    "apply_override",
    "candidates",
    "make_recipe",
    "parse_yaml",
    "read_recipe",
    "recipe_values",
    "recipe_yaml",
    "settle_distillation",
    "stage_kind",
    "stage_spec",
    "stages_before_compression",
    "with_values",
]
