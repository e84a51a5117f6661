"""The recipe's fields: typed, frozen, unknown keys refused.

Nothing here imports torch: a recipe is checked in milliseconds. A spec holds what the user asked for and never enters
an algorithm; the pipeline unpacks it into arguments.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.compression import QuantizeSpec
from moss_rlhf.recipe.data import DataSpec
from moss_rlhf.recipe.ensemble import EnsembleSpec
from moss_rlhf.recipe.finetuning import DistillSpec, FinetuneSpec, QuantizationAwareSpec
from moss_rlhf.recipe.scratch import ScratchSpec
from moss_rlhf.recipe.search import SearchSpec
from moss_rlhf.recipe.spec import Positive, Spec
from moss_rlhf.recipe.stages import FinetuneStage, Stage, allow_short_forms, stage_kind, stage_spec


class EvaluateSpec(Spec):
    batch_sizes: list[Positive] = Field(default=[1, 8, 32], min_length=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=200, description="of the bootstrap")
    speed_seconds: float = Field(60.0, gt=0, description="how long to measure speed, at least three rounds each")
    speed_rows: Positive = Field(
        256, description="texts that speed is measured on, a batch size; at least four batches"
    )
    translate: int = Field(
        1000, ge=0, description="translation: how many texts are translated for BLEU and chrF, at most; 0: none"
    )
    temperature: bool = Field(
        True, description="fit the temperature of the shipped classifier's probabilities on validation"
    )


class Recipe(Spec):
    """Everything that a run does. Two equal recipes on one machine give the same bits."""

    task: Literal["text-classification", "text-generation", "translation"]
    model: str | ScratchSpec = Field(description="hub id, local directory, or what to begin from scratch with")
    data: DataSpec
    stages: list[Stage] = Field(min_length=1, json_schema_extra=allow_short_forms)
    search: SearchSpec | None = Field(None, description="find the best values of some fields on validation first")
    evaluate: EvaluateSpec = EvaluateSpec()
    export: list[Literal["onnx", "ctranslate2", "compressed-tensors"]] = Field(default_factory=list)
    trust_remote_code: bool = Field(
        False, description="run code that the checkpoint brings along; off unless you set it"
    )
    seed: int = Field(0, ge=0, lt=2**32)
    output: str = "runs/run"

    @field_validator("stages")
    @classmethod
    def _order(cls, stages: list[Stage]) -> list[Stage]:
        kinds = [stage_kind(stage) for stage in stages]
        if "quantize" in kinds[:-1]:
            position = kinds.index("quantize")
            raise PydanticCustomError(
                "order",
                "stages.{position} is quantize, and {next} follows it; move quantize to the end",
                {"position": position, "next": kinds[position + 1]},
            )
        return stages

    @field_validator("stages")
    @classmethod
    def _one_grid(cls, stages: list[Stage]) -> list[Stage]:
        """What was trained for one grid is not rounded to another."""
        trained, place = None, 0
        for position, stage in enumerate(stages):
            spec = stage_spec(stage)
            training = spec.finetune if isinstance(spec, EnsembleSpec) else spec
            if isinstance(training, FinetuneSpec) and training.quantization_aware:
                trained, place = training.quantization_aware, position
            if isinstance(spec, QuantizeSpec) and trained and not _same_grid(trained, spec):
                raise PydanticCustomError(
                    "order",
                    "stages.{place} trains for {trained}, and stages.{position} quantizes to {scheme} on another grid; "
                    "give both the same scheme and group_size",
                    {"place": place, "trained": trained.scheme, "position": position, "scheme": spec.scheme},
                )
        return stages


def _same_grid(trained: QuantizationAwareSpec, spec: QuantizeSpec) -> bool:
    if trained.scheme == "int4":
        return spec.scheme == "int4" and spec.group_size == trained.group_size
    return spec.scheme != "int4"


COMPRESSING = frozenset({"narrow", "shorten", "prune", "trim_vocabulary", "quantize"})


def stages_before_compression(recipe: Recipe) -> int:
    """How many stages come before the first compressing one: what enters it is 'before', and the teacher 'parent'."""
    kinds = [stage_kind(stage) for stage in recipe.stages]
    return next((index for index, kind in enumerate(kinds) if kind in COMPRESSING), len(kinds))


def settle_distillation(recipe: Recipe, source_is_trained: bool) -> Recipe:
    """The recipe with every `distill: auto` decided: the parent after a compressing stage, if its head was trained.

    source_is_trained   whether the recipe's model serves the task as it is.
    """
    parent = stages_before_compression(recipe)
    before = {stage_kind(stage) for stage in recipe.stages[:parent]}
    trained = source_is_trained or bool(before & {"finetune", "ensemble"})

    def settled(index: int, stage: Stage) -> Stage:
        if not isinstance(stage, FinetuneStage) or stage.finetune.distill != "auto":
            return stage
        mixes = stage.finetune.mixup > 0  # mixed rows have no teacher's answer of their own
        distill = DistillSpec() if trained and index >= parent and not mixes else None
        return FinetuneStage(finetune=stage.finetune.model_copy(update={"distill": distill}))

    stages = [settled(index, stage) for index, stage in enumerate(recipe.stages)]
    return recipe.model_copy(update={"stages": stages})
