"""What a run works with, before its first stage: clean, tokenized rows, the source model, a folder for every stage."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moss_rlhf.checking import check_labels, check_output, check_stages
from moss_rlhf.data import Splits, load_splits
from moss_rlhf.files import digest, file_digest
from moss_rlhf.model.checkpoint import (
    Model,
    load_checkpoint,
    load_pretrained,
    load_tokenizer,
)
from moss_rlhf.model.config import position_limit, read_config, trained_labels
from moss_rlhf.model.locate import locate, weight_files
from moss_rlhf.model.runtime import Batch, usable_cores
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import FinetuneSpec, Recipe, recipe_values, stage_kind, stage_spec, stages_before_compression
from moss_rlhf.rundir import RunDirectory, StageFolder
from moss_rlhf.stages import StageContext
from moss_rlhf.tasks import TASKS, Task
from moss_rlhf.tasks.batching import batches_of, padding_of
from moss_rlhf.tasks.lengths import choose_max_length, length_facts
from moss_rlhf.tasks.loading import load

_LENGTH_SAMPLE = 10_000
_COMPANIONS = ("*.json", "*.txt", "*.model")
_DECIDING = ("moss-rlhf", "torch", "transformers", "accelerate", "tokenizers")


@dataclass(frozen=True)
class EncodedSplits:
    """Tokenized rows. `evaluation` is test where there is one, else validation; `facts` tell of each split."""

    train: Any
    validation: Any
    evaluation: Any
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Encoder:
    """The run's texts, and the rows that a tokenizer makes of them: rows belong to a tokenizer, and stages may cut it.

    Rows are kept in files named by the texts and by what the tokenizer is, so asking again costs nothing.
    """

    splits: Splits
    task: Task
    config: Mapping[str, Any]
    max_length: int | Literal["auto"]
    seed: int
    cache: Path
    made: dict[str, EncodedSplits] = field(default_factory=dict)

    @property
    def present(self) -> dict[str, Any]:
        """{split: its rows, not tokenized}."""
        every = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        return {name: rows for name, rows in every.items() if rows is not None}

    @property
    def evaluation_split(self) -> str:
        return "test" if "test" in self.present else "validation"

    def rows(self, tokenizer: Any) -> EncodedSplits:
        name = tokenizer_digest(tokenizer)
        if name not in self.made:
            self.made[name] = self._encode(tokenizer, name)
        return self.made[name]

    def _encode(self, tokenizer: Any, name: str) -> EncodedSplits:
        lengths = {
            split: self.task.lengths(rows, tokenizer, _LENGTH_SAMPLE, self.seed) for split, rows in self.present.items()
        }
        limit = position_limit(self.config, tokenizer.model_max_length)
        longest = choose_max_length(self.max_length, lengths["train"], self.task.longest(self.max_length, limit))
        place = digest([self.splits.digest, longest, name])[:16]
        encoded = {
            split: self.task.encode(rows, tokenizer, longest, str(self.cache / f"{split}-{place}-tokens.arrow"))
            for split, rows in self.present.items()
        }
        facts = {
            split: self.splits.facts[split] | {"tokens": length_facts(values, longest, self.task.cuts)}
            for split, values in lengths.items()
        }
        return EncodedSplits(encoded["train"], encoded["validation"], encoded[self.evaluation_split], facts)


def tokenizer_digest(tokenizer: Any) -> str:
    """Names what a tokenizer makes of texts."""
    parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "limit": tokenizer.model_max_length}
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["rules"] = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return digest([parts, tokenizer.all_special_ids, tokenizer.pad_token_id, list(tokenizer.model_input_names)])


@dataclass(frozen=True)
class Session:
    """The fixed facts of one run; whatever else happens is a function of them."""

    recipe: Recipe
    place: RunDirectory
    progress: Progress
    source: Path
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    encoder: Encoder
    folders: tuple[StageFolder, ...]

    @property
    def task(self) -> Task:
        return TASKS[self.recipe.task]

    @property
    def fingerprint(self) -> str:
        return digest([self.folders[-1].fingerprint, recipe_values(self.recipe)])

    @property
    def parent(self) -> int:
        """How many stages come before the first compressing one: what enters it is 'before', and the teacher."""
        return stages_before_compression(self.recipe)

    @property
    def head_is_trained(self) -> bool:
        """Whether the parent's head was ever trained for these labels; a language model's always was."""
        trained = not self.task.has_classes or trained_labels(read_config(self.source)) == self.labels
        return self.parent > 0 or trained

    @property
    def caveats(self) -> list[str]:
        """What a reader of the report must know of its comparison."""
        found = {
            "There is no test split: before and after are measured on validation, which also chose the checkpoints.": (
                self.encoder.evaluation_split == "validation"
            ),
            "Nothing is exported to a runtime: 'after' is the checkpoint in PyTorch.": not self.recipe.export,
            "The model that entered compression had no trained head, so there is no 'before' to compare with.": (
                not self.head_is_trained
            ),
            "The machine was busy with other work: speeds and their ratios may be off; measure again on a quiet one.": (
                os.getloadavg()[0] > usable_cores() + 1
            ),
        }
        return [sentence for sentence, holds in found.items() if holds]

    def folder_after(self, stages: int) -> Path:
        return self.folders[stages - 1].model if stages else self.source

    def model_after(self, stages: int) -> Model:
        """The model after so many stages, always read from disk: going on and resuming are one path."""
        if stages:
            return load_checkpoint(self.folder_after(stages), self.task.auto_class())
        import torch

        torch.manual_seed(self.recipe.seed)  # a new head is drawn from it
        auto_class, labels = self.task.auto_class(), self.labels if self.task.has_classes else None
        return load_pretrained(self.source, self.task.name, auto_class, labels, self.recipe.trust_remote_code)

    def rows_after(self, stages: int) -> EncodedSplits:
        """The rows that the model after so many stages reads."""
        trust = self.recipe.trust_remote_code and not stages
        return self.encoder.rows(load_tokenizer(self.folder_after(stages), trust))

    def context(self, stage: int) -> StageContext:
        """What a stage may use besides its model."""
        rows, present = self.rows_after(stage), self.encoder.present
        return StageContext(
            rows.train,
            rows.validation,
            self.recipe.seed,
            self.folders[stage].work,
            self.teacher,
            self.progress,
            [present["train"], present["validation"]],
            lambda tokenizer: self.encoder.rows(tokenizer).train,
        )

    def teacher(self, name: str) -> Model:
        return self.model_after(self.parent) if name == "parent" else load(name)

    def sample_batches(self, tokenizer: Any, count: int = 4, size: int = 8) -> list[Batch]:
        """A few real batches, to hold an export against PyTorch with."""
        rows = [dict(row) for row in self._sample(self.encoder.rows(tokenizer).evaluation, count * size)]
        return list(batches_of(rows, size, padding_of(tokenizer)))

    def sample_texts(self, count: int = 8) -> list[tuple[str, str]]:
        """A few real texts, or pairs of them, likewise: the first and the last of a row's text columns."""
        names = [column.name for column in self.task.columns if column.kind == "text"]
        rows = self._sample(self.encoder.present[self.encoder.evaluation_split], count)
        return [(row[names[0]], row[names[-1]]) for row in rows]

    def _sample(self, rows: Any, most: int) -> Any:
        order = np.random.default_rng(self.recipe.seed).permutation(len(rows))[:most]
        return rows.select(np.sort(order))


def prepare(recipe: Recipe, place: RunDirectory, progress: Progress, threads: int) -> Session:
    """Read the data and tokenize it, find the model, name every stage's folder."""
    task, source = TASKS[recipe.task], locate(recipe.model)
    check_stages(recipe, source)
    if not (place.path / "stages").exists():  # a run that goes on has taken its space already
        check_output(recipe, source)
    splits = load_splits(
        recipe.data,
        task.columns,
        seed=recipe.seed,
        cache=place.data,
        known_labels=trained_labels(read_config(source)) if task.has_classes else None,
        progress=progress,
    )
    config = read_config(source)
    check_labels(recipe, config, splits.labels)
    encoder = Encoder(splits, task, config, recipe.data.max_length, recipe.seed, place.data)
    folders = _folders(recipe, place, _start_fingerprint(recipe, source, splits, threads))
    session = Session(recipe, place, progress, source, splits.labels, splits.notes, encoder, folders)
    session.rows_after(0)  # a tokenizer that can't be loaded is found before any work
    return session


def _start_fingerprint(recipe: Recipe, source: Path, splits: Splits, threads: int) -> str:
    """Over everything but the stages that decides a run's bits."""
    return digest(
        {
            "source": _describe([*weight_files(source), *_companions(source)]),
            "data": splits.digest,
            "max_length": recipe.data.max_length,
            "seed": recipe.seed,
            "threads": threads,
            "versions": {name: importlib.metadata.version(name) for name in _DECIDING},
        }
    )


def _companions(source: Path) -> list[Path]:
    """What stands beside the weights and decides what they mean: config and tokenizer."""
    return sorted(file for pattern in _COMPANIONS for file in source.glob(pattern))


def _describe(files: Sequence[Path]) -> list[list[str]]:
    return [[file.name, file_digest(file)] for file in files]


def _teacher_files(spec: object) -> list[list[str]]:
    """A teacher that is no stage of this run."""
    if not isinstance(spec, FinetuneSpec) or spec.distill is None or spec.distill.teacher == "parent":
        return []
    place = locate(spec.distill.teacher)
    return _describe([*weight_files(place), place / "config.json"])


def _folders(recipe: Recipe, place: RunDirectory, start: str) -> tuple[StageFolder, ...]:
    folders: list[StageFolder] = []
    fingerprint = start
    for index, stage in enumerate(recipe.stages):
        fingerprint = digest([stage.model_dump(mode="json"), fingerprint, *_teacher_files(stage_spec(stage))])
        folders.append(place.stage(index, stage_kind(stage), fingerprint))
    return tuple(folders)
