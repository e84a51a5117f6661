"""The recipe's `data`: where the rows of each split come from and how they are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.augment import AugmentSpec
from moss_rlhf.recipe.clean import CleanSpec
from moss_rlhf.recipe.collect import CollectSpec
from moss_rlhf.recipe.spec import Name, Positive, Spec

ColumnReference = int | str | list[int | str]


class SplitLayout(Spec):
    """One split with its own layout: where its rows are and how to read them."""

    file: str | None = Field(None, description="path of a csv, tsv, txt, json, jsonl or parquet file, also .gz")
    files: dict[str, str] = Field(
        default_factory=dict, description="a text file for each of the task's columns, whose lines belong together"
    )
    hub: str | None = Field(None, description="data set id on the hub, or a local directory of one")
    split: str | None = Field(None, description="the split's name in the hub data set; default: this split's own")
    format: Literal["csv", "tsv", "txt", "json", "jsonl", "parquet"] | None = Field(
        None, description="default: from the file's name"
    )
    header: bool | None = Field(None, description="whether the first line names the columns; default: found out")
    delimiter: str | None = Field(None, min_length=1, max_length=1, description="default: from the format")
    documents: Literal["lines", "paragraphs", "file"] | None = Field(
        None, description="how a txt file of texts alone is parted; default: paragraphs where it has blank lines"
    )
    encoding: str = Field("utf-8", description="of text files, such as utf-8, gb18030, utf-16")
    columns: dict[str, ColumnReference] = Field(
        default_factory=dict, description="the task's columns: a name or a position from 0; a list is joined"
    )
    labels: dict[Name, Name] = Field(default_factory=dict, description="label as it stands in the file: label name")

    @model_validator(mode="after")
    def _one_source(self) -> SplitLayout:
        if sum((self.file is not None, self.hub is not None, bool(self.files))) != 1:
            raise PydanticCustomError("one_source", "give one of 'file', 'files' and 'hub', not several and not none")
        return self


class DataSpec(Spec):
    """Where the rows of each split come from."""

    train: str | SplitLayout
    validation: Annotated[float, Field(gt=0, lt=1)] | str | SplitLayout = Field(
        0.1, description="a file, or the share held out of train (seeded; stratified by label)"
    )
    test: str | SplitLayout | None = None
    columns: dict[str, ColumnReference] = Field(default_factory=dict, description="for splits without their own")
    labels: dict[Name, Name] = Field(default_factory=dict, description="for splits without their own")
    max_length: Literal["auto"] | Annotated[int, Field(ge=4)] = Field(
        "auto", description="tokens kept of each text; auto: the 99th percentile of train, within the model's limit"
    )
    truncation: Literal["head", "tail", "head+tail", "windows"] = Field(
        "head",
        description="what is kept of a longer text; windows: all of it, in overlapping rows whose logits are averaged",
    )
    limit: Positive | dict[Literal["train", "validation", "test"], Positive] | None = Field(
        None, description="a seeded subset of each split"
    )
    broken_lines: Literal["error", "skip"] = Field(
        "error", description="a line with missing cells, an empty text or label, or bytes that can't be decoded"
    )
    augment: AugmentSpec | None = Field(None, description="changed copies of the training rows; off unless given")

    collect: CollectSpec | None = Field(
        None, description="which texts of train, a large corpus, are the task's; none: all are"
    )
    clean: CleanSpec | None = Field(
        None, description="what is looked for in the rows; none: only equal texts in two splits"
    )
    balance: Literal["none", "oversample", "undersample"] = Field(
        "none", description="repeat or leave out rows of train until every class has equally many"
    )

    @field_validator("validation", mode="before")
    @classmethod
    def _share_or_file(cls, value: object) -> object:
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            return value

    @property
    def corpus(self) -> tuple[str, ...]:
        """The splits that `collect` chooses from: train, and a share held out of it."""
        return ("train", "validation") if isinstance(self.validation, float) else ("train",)
