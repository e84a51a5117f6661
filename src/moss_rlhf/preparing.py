"""What a run works with, before its first stage: clean, tokenized rows, the source model, a folder for every stage."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.augmenting import Augmentation, augment
from moss_rlhf.checking import check_folds, check_labels, check_output, check_rows, check_stages, trains_on_copies
from moss_rlhf.curating import curate
from moss_rlhf.data import Splits, load_splits
from moss_rlhf.files import digest, file_digest
from moss_rlhf.model.checkpoint import (
    Model,
    load_checkpoint,
    load_pretrained,
    load_tokenizer,
)
from moss_rlhf.model.config import position_limit, read_config, trained_labels
from moss_rlhf.model.cutting import Cut
from moss_rlhf.model.locate import locate, weight_files
from moss_rlhf.model.runtime import Batch, usable_cores
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    DistillSpec,
    FinetuneSpec,
    PretrainSpec,
    Recipe,
    recipe_values,
    stage_kind,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.rundir import RunDirectory, StageFolder
from moss_rlhf.tasks import TASKS, Task, TextClassification
from moss_rlhf.tasks.batching import batches_of, padding_of
from moss_rlhf.tasks.lengths import choose_max_length, length_facts
from moss_rlhf.tasks.loading import load

_LENGTH_SAMPLE = 10_000
_COMPANIONS = ("*.json", "*.txt", "*.model")
_DECIDING = ("moss-rlhf", "torch", "transformers", "accelerate", "tokenizers")


@dataclass(frozen=True)
class EncodedSplits:
    """Tokenized rows. `evaluation` is test where there is one, else validation; `texts` are its rows, not tokenized.

    `augmented` are the training rows with their changed copies behind them; without any, the training rows.
    train_texts   the rows of train, not tokenized.
    cut   how long texts were cut; every model of the run is saved with it.
    """

    train: Any
    augmented: Any
    validation: Any
    evaluation: Any
    evaluation_split: str
    texts: Any
    train_texts: Any
    facts: dict[str, dict[str, Any]]
    cut: Cut


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
        before = self.recipe.stages[: self.parent]
        return (
            any(stage_kind(stage) == "finetune" for stage in before)
            or trained_labels(read_config(self.source)) == self.labels
        )

    @property
    def caveats(self) -> list[str]:
        """What a reader of the report must know of its comparison."""
        found = {
            "There is no test split: before and after are measured on validation, which also chose the checkpoints.": (
                self.rows.evaluation_split == "validation"
            ),
            "Nothing is exported to a runtime: 'after' is the checkpoint in PyTorch.": not self.recipe.export,
            "The compressed-tensors files are for vLLM, which does not run here: 'after' is the checkpoint in PyTorch, "
            "whose weights they hold bit for bit.": self.recipe.export == ["compressed-tensors"],
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
        model = load_pretrained(self.source, self.task.name, auto_class, self.labels, self.recipe.trust_remote_code)
        model.cut = self.rows.cut
        return model

    def rows_to_train(self, spec: object) -> Any:
        """The encoded rows that a stage trains on: with their changed copies, where it uses them."""
        return self.rows.augmented if trains_on_copies(self.recipe.data.augment, spec) else self.rows.train

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
    check_rows(recipe)
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
    splits = _curate(splits, task, source, recipe, place, progress)
    check_folds(recipe, splits.facts["train"]["classes"])
    augmentation = augment(recipe, splits, place.data, progress)
    rows = _encode(splits, augmentation, task, source, recipe, place.data)
    start = _start_fingerprint(recipe, source, splits, augmentation, threads)
    return Session(recipe, place, progress, source, splits.labels, splits.notes, rows, _folders(recipe, place, start))


def _curate(
    splits: Splits, task: Task, source: Path, recipe: Recipe, place: RunDirectory, progress: Progress
) -> Splits:
    def open_model() -> Model:
        return load_pretrained(source, task.name, task.auto_class(), splits.labels, recipe.trust_remote_code)

    return curate(
        splits,
        task.columns,
        recipe.data,
        seed=recipe.seed,
        place=place,
        source=digest(_describe([*weight_files(source), *_companions(source)])),
        open_model=open_model,
        progress=progress,
    )


def _encode(
    splits: Splits, augmentation: Augmentation | None, task: Task, source: Path, recipe: Recipe, cache: Path
) -> EncodedSplits:
    from datasets import concatenate_datasets

    tokenizer = load_tokenizer(source, recipe.trust_remote_code)
    limit = position_limit(read_config(source), tokenizer.model_max_length)
    present = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    copies = {f"copy{number}": rows for number, rows in enumerate(augmentation.copies, 1)} if augmentation else {}
    lengths = {
        name: task.lengths(rows, tokenizer, _LENGTH_SAMPLE, recipe.seed)
        for name, rows in present.items()
        if rows is not None
    }
    longest = choose_max_length(recipe.data.max_length, lengths["train"], limit)
    cut = Cut(recipe.data.truncation, longest)
    made = [augmentation.digest] if augmentation else []
    name = digest([splits.digest, cut.declared(), _describe(_companions(source)), *made])

    def encode(split: str) -> Any:
        rows, file = (present | copies)[split], str(cache / f"{split}-{name[:16]}-tokens.arrow")
        if isinstance(task, TextClassification):
            return task.encode(rows, tokenizer, longest, file, keep=cut.keep)
        return task.encode(rows, tokenizer, longest, file)

    split = "validation" if splits.test is None else "test"
    facts = {name: splits.facts[name] | {"tokens": length_facts(values, longest)} for name, values in lengths.items()}
    train, validation = encode("train"), encode("validation")
    if augmentation:
        facts["train"] = facts["train"] | {"augmented": augmentation.facts}
    augmented = concatenate_datasets([train, *map(encode, copies)]) if copies else train
    evaluation = validation if split == "validation" else encode("test")
    return EncodedSplits(train, augmented, validation, evaluation, split, present[split], splits.train, facts, cut)


def _start_fingerprint(
    recipe: Recipe, source: Path, splits: Splits, augmentation: Augmentation | None, threads: int
) -> str:
    """Over everything but the stages that decides a run's bits."""
    return digest(
        {
            "source": _describe([*weight_files(source), *_companions(source)]),
            "data": splits.digest if augmentation is None else [splits.digest, augmentation.digest],
            "max_length": recipe.data.max_length,
            "truncation": recipe.data.truncation,
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


def _foreign_files(spec: object) -> list[list[str]]:
    """What a stage reads that is neither the run's data nor a stage: a teacher, a domain's texts."""
    if isinstance(spec, PretrainSpec) and spec.texts != "task":
        return _describe([Path(spec.texts)])
    if not isinstance(spec, FinetuneSpec) or not isinstance(spec.distill, DistillSpec):
        return []
    if spec.distill.teacher == "parent":
        return []
    place = locate(spec.distill.teacher)
    return _describe([*weight_files(place), place / "config.json"])


def _folders(recipe: Recipe, place: RunDirectory, start: str) -> tuple[StageFolder, ...]:
    folders: list[StageFolder] = []
    fingerprint = start
    for index, stage in enumerate(recipe.stages):
        fingerprint = digest([stage.model_dump(mode="json"), fingerprint, *_foreign_files(stage_spec(stage))])
        folders.append(place.stage(index, stage_kind(stage), fingerprint))
    return tuple(folders)
