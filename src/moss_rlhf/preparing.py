"""What a run works with, before its first stage: clean, tokenized rows, the source model, a folder for every stage."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.checking import check_folds, check_labels, check_output, check_stages
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
from moss_rlhf.tasks import TASKS, Task
from moss_rlhf.tasks.batching import batches_of, padding_of
from moss_rlhf.tasks.lengths import choose_max_length, length_facts
from moss_rlhf.tasks.loading import load

_LENGTH_SAMPLE = 10_000
_COMPANIONS = ("*.json", "*.txt", "*.model")
_DECIDING = ("moss-rlhf", "torch", "transformers", "accelerate", "tokenizers")


@dataclass(frozen=True)
class EncodedSplits:
    """Tokenized rows. `evaluation` is test where there is one, else validation; `texts` are its rows, not tokenized."""

    train: Any
    validation: Any
    evaluation: Any
    evaluation_split: str
    texts: Any
    facts: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Session:
    """The fixed facts of one run; whatever else happens is a function of them."""

    recipe: Recipe
    place: RunDirectory
    progress: Progress
    source: Path
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    rows: EncodedSplits
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
        """Whether the parent's head was ever trained for these labels."""
        return self.parent > 0 or trained_labels(read_config(self.source)) == self.labels

    @property
    def caveats(self) -> list[str]:
        """What a reader of the report must know of its comparison."""
        found = {
            "There is no test split: before and after are measured on validation, which also chose the checkpoints.": (
                self.rows.evaluation_split == "validation"
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
        auto_class = self.task.auto_class()
        return load_pretrained(self.source, self.task.name, auto_class, self.labels, self.recipe.trust_remote_code)

    def teacher(self, name: str) -> Model:
        return self.model_after(self.parent) if name == "parent" else load(name)

    def sample_batches(self, tokenizer: Any, count: int = 4, size: int = 8) -> list[Batch]:
        """A few real batches, to hold an export against PyTorch with."""
        order = np.random.default_rng(self.recipe.seed).permutation(len(self.rows.evaluation))[: count * size]
        rows = [dict(row) for row in self.rows.evaluation.select(np.sort(order))]
        return list(batches_of(rows, size, padding_of(tokenizer)))


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
        known_labels=trained_labels(read_config(source)),
        progress=progress,
    )
    check_labels(recipe, read_config(source), splits.labels)
    check_folds(recipe, splits.facts["train"]["classes"])
    rows = _encode(splits, task, source, recipe, place.data)
    start = _start_fingerprint(recipe, source, splits, threads)
    return Session(recipe, place, progress, source, splits.labels, splits.notes, rows, _folders(recipe, place, start))


def _encode(splits: Splits, task: Task, source: Path, recipe: Recipe, cache: Path) -> EncodedSplits:
    tokenizer = load_tokenizer(source, recipe.trust_remote_code)
    limit = position_limit(read_config(source), tokenizer.model_max_length)
    present = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    lengths = {
        name: task.lengths(rows, tokenizer, _LENGTH_SAMPLE, recipe.seed)
        for name, rows in present.items()
        if rows is not None
    }
    longest = choose_max_length(recipe.data.max_length, lengths["train"], limit)
    name = digest([splits.digest, longest, _describe(_companions(source))])

    def encode(split: str) -> Any:
        return task.encode(present[split], tokenizer, longest, str(cache / f"{split}-{name[:16]}-tokens.arrow"))

    split = "validation" if splits.test is None else "test"
    facts = {name: splits.facts[name] | {"tokens": length_facts(values, longest)} for name, values in lengths.items()}
    train, validation = encode("train"), encode("validation")
    return EncodedSplits(
        train, validation, validation if split == "validation" else encode("test"), split, present[split], facts
    )


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
