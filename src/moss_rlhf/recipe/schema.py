"""The recipe's fields: typed, frozen, unknown keys refused.

Nothing here imports torch: a recipe is checked in milliseconds. A spec holds what the user asked for and never enters
an algorithm; the pipeline unpacks it into arguments.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Name, Positive, Spec
from moss_rlhf.recipe.stages import Stage, allow_short_forms, stage_kind

ColumnReference = int | str | list[int | str]

# --- data ----------------------------------------------------------------------------------------------------------


class SplitLayout(Spec):
    """One split with its own layout: where its rows are and how to read them."""

    file: str | None = Field(None, description="path of a csv, tsv, txt, json, jsonl or parquet file, also .gz")
    hub: str | None = Field(None, description="data set id on the hub, or a local directory of one")
    split: str | None = Field(None, description="the split's name in the hub data set; default: this split's own")
    format: Literal["csv", "tsv", "txt", "json", "jsonl", "parquet"] | None = Field(
        None, description="default: from the file's name"
    )
    header: bool | None = Field(None, description="whether the first line names the columns; default: found out")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="default: from the format")
    encoding: str = Field("utf-8", description="of text files, such as utf-8, gb18030, utf-16")
    columns: dict[str, ColumnReference] = Field(
        default_factory=dict, description="the task's columns: a name or a position from 0; a list is joined"
    )
    labels: dict[Name, Name] = Field(default_factory=dict, description="label as it stands in the file: label name")

    @model_validator(mode="after")
    def _one_source(self) -> SplitLayout:
        if (self.file is None) == (self.hub is None):
            raise PydanticCustomError("one_source", "give either 'file' or 'hub', not both and not neither")
        return self


class DataSpec(Spec):
    """Where the rows of each split come from."""

    train: str | SplitLayout
    validation: Annotated[float, Field(gt=0, lt=1)] | str | SplitLayout = Field(
        0.1, description="a file, or the share held out of train (stratified, seeded)"
    )
    test: str | SplitLayout | None = None
    columns: dict[str, ColumnReference] = Field(default_factory=dict, description="for splits without their own")
    labels: dict[Name, Name] = Field(default_factory=dict, description="for splits without their own")
    max_length: Literal["auto"] | Annotated[int, Field(ge=4)] = Field(
        "auto", description="tokens kept of each text; auto: the 99th percentile of train, within the model's limit"
    )
    limit: Positive | dict[Literal["train", "validation", "test"], Positive] | None = Field(
        None, description="a seeded subset of each split"
    )
    broken_lines: Literal["error", "skip"] = Field(
        "error", description="a line with missing cells, an empty text or label, or bytes that can't be decoded"
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_file(cls, value: object) -> object:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value


# --- the recipe ----------------------------------------------------------------------------------------------------


class EvaluateSpec(Spec):
    batch_sizes: list[Positive] = Field(default=[1, 8, 32], min_length=1)
    confidence: float = Field(0.95, gt=0.5, lt=1)
    resamples: int = Field(2000, ge=200, description="of the bootstrap")
    speed_seconds: float = Field(60.0, gt=0, description="how long to measure speed, at least three rounds each")
    speed_rows: Positive = Field(
        256, description="texts that speed is measured on, a batch size; at least four batches"
    )


class Recipe(Spec):
    """Everything that a run does. Two equal recipes on one machine give the same bits."""

    task: Literal["text-classification"]
    model: str = Field(description="hub id or local directory")
    data: DataSpec
    stages: list[Stage] = Field(min_length=1, json_schema_extra=allow_short_forms)
    evaluate: EvaluateSpec = EvaluateSpec()
    export: list[Literal["onnx"]] = Field(default_factory=list)
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
                "stage {position} is quantize, and {next} follows it; move quantize to the end",
                {"position": position, "next": kinds[position + 1]},
            )
        return stages


COMPRESSING = frozenset({"narrow", "shorten", "prune", "quantize"})


def stages_before_compression(recipe: Recipe) -> int:
    """How many stages come before the first compressing one: what enters it is 'before', and the teacher 'parent'."""
    kinds = [stage_kind(stage) for stage in recipe.stages]
    return next((index for index, kind in enumerate(kinds) if kind in COMPRESSING), len(kinds))
