"""What a run works with, before its first stage: clean, tokenized rows, the source model, a folder for every stage."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.augmenting import Augmentation, augment
from moss_rlhf.checking import (
    check_budgets,
    check_clean_folds,
    check_folds,
    check_labels,
    check_output,
    check_rows,
    check_stages,
    settled,
    source_of,
    trains_on_copies,
)
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
    DataSpec,
    DistillSpec,
    FinetuneSpec,
    PretrainSpec,
    Recipe,
    TrimVocabularySpec,
    recipe_values,
    stage_kind,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.rundir import RunDirectory, StageFolder
from moss_rlhf.stages import StageContext
from moss_rlhf.tasks import TASKS, Task, TextClassification
from moss_rlhf.tasks.batching import batches_of, padding_of
from moss_rlhf.tasks.lengths import choose_max_length, length_facts
from moss_rlhf.tasks.loading import load

_LENGTH_SAMPLE = 10_000
_COMPANIONS = ("*.json", "*.txt", "*.model")
_DECIDING = ("moss-rlhf", "torch", "transformers", "accelerate", "tokenizers")


@dataclass(frozen=True)
class EncodedSplits:
    """Tokenized rows. `evaluation` is test where there is one, else validation; `facts` tell of each split.

    augmented   the training rows with their changed copies behind them; without any, the training rows.
    cut         how long texts were cut.
    """

    train: Any
    augmented: Any
    validation: Any
    evaluation: Any
    facts: dict[str, dict[str, Any]]
    cut: Cut


@dataclass(frozen=True)
class Encoder:
    """The run's texts, and the rows that a tokenizer makes of them: rows belong to a tokenizer, and stages may cut it.

    Rows are kept in files named by the texts and by what the tokenizer is, so asking again costs nothing.
    """

    splits: Splits
    augmentation: Augmentation | None
    task: Task
    config: Mapping[str, Any]
    spec: DataSpec
    seed: int
    cache: Path
    made: dict[str, EncodedSplits] = field(default_factory=dict)

    @property
    def present(self) -> dict[str, Any]:
        """{split: its rows, not tokenized}."""
        every = {"train": self.splits.train, "validation": self.splits.validation, "test": self.splits.test}
        return {name: rows for name, rows in every.items() if rows is not None}

    @property
    def copies(self) -> dict[str, Any]:
        """{name: a changed copy of the rows of train, not tokenized}."""
        made = self.augmentation.copies if self.augmentation else ()
        return {f"copy{number}": rows for number, rows in enumerate(made, 1)}

    @property
    def read(self) -> list[Any]:
        """All rows that stages may look at, not tokenized: those of train, its copies, validation."""
        return [self.splits.train, *self.copies.values(), self.splits.validation]

    @property
    def evaluation_split(self) -> str:
        return "test" if "test" in self.present else "validation"

    @property
    def evaluated(self) -> Any:
        """The rows that before and after are measured on, not tokenized."""
        return self.present[self.evaluation_split]

    def rows(self, tokenizer: Any) -> EncodedSplits:
        name = tokenizer_digest(tokenizer)
        if name not in self.made:
            self.made[name] = self._encode(tokenizer, name)
        return self.made[name]

    def _encode(self, tokenizer: Any, name: str) -> EncodedSplits:
        from datasets import concatenate_datasets

        lengths = {
            split: self.task.lengths(rows, tokenizer, _LENGTH_SAMPLE, self.seed) for split, rows in self.present.items()
        }
        cut = self._cut(tokenizer, lengths["train"])
        made = [self.augmentation.digest] if self.augmentation else []
        place = digest([self.splits.digest, cut.declared(), name, *made])[:16]
        encoded = {
            split: self._tokens(rows, tokenizer, cut, self.cache / f"{split}-{place}-tokens.arrow")
            for split, rows in (self.present | self.copies).items()
        }
        train, copies = encoded["train"], [encoded[copy] for copy in self.copies]
        return EncodedSplits(
            train=train,
            augmented=concatenate_datasets([train, *copies]) if copies else train,
            validation=encoded["validation"],
            evaluation=encoded[self.evaluation_split],
            facts=self._facts(lengths, cut.max_length),
            cut=cut,
        )

    def _cut(self, tokenizer: Any, lengths: NDArray[np.int64]) -> Cut:
        wanted, limit = self.spec.max_length, position_limit(self.config, tokenizer.model_max_length)
        return Cut(self.spec.truncation, choose_max_length(wanted, lengths, self.task.longest(wanted, limit)))

    def _tokens(self, rows: Any, tokenizer: Any, cut: Cut, file: Path) -> Any:
        if isinstance(self.task, TextClassification):
            return self.task.encode(rows, tokenizer, cut.max_length, str(file), keep=cut.keep)
        return self.task.encode(rows, tokenizer, cut.max_length, str(file))

    def _facts(self, lengths: Mapping[str, NDArray[np.int64]], longest: int) -> dict[str, dict[str, Any]]:
        facts = {
            split: self.splits.facts[split] | {"tokens": length_facts(values, longest, self.task.cuts)}
            for split, values in lengths.items()
        }
        if self.augmentation:
            facts["train"] = facts["train"] | {"augmented": self.augmentation.facts}
        return facts


def tokenizer_digest(tokenizer: Any) -> str:
    """Names what a tokenizer makes of texts."""
    parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "limit": tokenizer.model_max_length}
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        parts["rules"] = {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
    return digest([parts, tokenizer.all_special_ids, tokenizer.pad_token_id, list(tokenizer.model_input_names)])


@dataclass(frozen=True)
class Session:
    """The fixed facts of one run; whatever else happens is a function of them.

    prefix   where the outputs of frozen blocks stay for other runs, the trials of a search; None: with their stage.
    """

    recipe: Recipe
    place: RunDirectory
    progress: Progress
    source: Path
    labels: tuple[str, ...]
    notes: tuple[str, ...]
    encoder: Encoder
    folders: tuple[StageFolder, ...]
    prefix: Path | None = None

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
        return trained or any(
            stage_kind(stage) in ("finetune", "ensemble") for stage in self.recipe.stages[: self.parent]
        )

    @property
    def caveats(self) -> list[str]:
        """What a reader of the report must know of its comparison."""
        found = {
            "There is no test split: before and after are measured on validation, which also chose the checkpoints.": (
                self.encoder.evaluation_split == "validation"
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
        auto_class, labels = self.task.auto_class(), self.labels if self.task.has_classes else None
        model = load_pretrained(self.source, self.task.name, auto_class, labels, self.recipe.trust_remote_code)
        model.cut = self.cut(model.tokenizer)
        return model

    def cut(self, tokenizer: Any) -> Cut | None:
        """How long a classifier's texts are cut, which is saved with it: by what its tokenizer makes of them."""
        return self.encoder.rows(tokenizer).cut if self.task.has_classes else None

    def rows_after(self, stages: int) -> EncodedSplits:
        """The rows that the model after so many stages reads."""
        trust = self.recipe.trust_remote_code and not stages
        return self.encoder.rows(load_tokenizer(self.folder_after(stages), trust))

    def rows_to_train(self, spec: object, rows: EncodedSplits) -> Any:
        """Those that a stage trains on: with their changed copies, where it uses them."""
        return rows.augmented if trains_on_copies(self.recipe.data.augment, spec) else rows.train

    def context(self, stage: int) -> StageContext:
        """What a stage may use besides its model."""
        rows, spec = self.rows_after(stage), stage_spec(self.recipe.stages[stage])
        aligned = rows.cut.keep != "windows"  # of which a text has as many as its tokens fill

        return StageContext(
            train=self.rows_to_train(spec, rows),
            measured=rows.train,
            validation=rows.validation,
            texts=self.encoder.splits.train,
            seed=self.recipe.seed,
            work=self.folders[stage].work,
            teacher=self.teacher,
            progress=self.progress,
            every_text=self.encoder.read,
            prefix=self.prefix,
            train_as=(lambda tokenizer: self.rows_to_train(spec, self.encoder.rows(tokenizer))) if aligned else None,
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
        rows = self._sample(self.encoder.evaluated, count)
        return [(row[names[0]], row[names[-1]]) for row in rows]

    def _sample(self, rows: Any, most: int) -> Any:
        order = np.random.default_rng(self.recipe.seed).permutation(len(rows))[:most]
        return rows.select(np.sort(order))


def prepare(recipe: Recipe, place: RunDirectory, progress: Progress, threads: int) -> Session:
    """Read the data and tokenize it, find the model, name every stage's folder. The session's recipe is settled."""
    recipe = settled(recipe)
    task, source = TASKS[recipe.task], source_of(recipe)
    check_stages(recipe, source)
    check_rows(recipe)
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
    check_clean_folds(recipe, splits.facts["train"].get("classes", {}))
    splits = _curate(splits, task, source, recipe, place, progress)
    check_folds(recipe, splits.facts["train"].get("classes", {}))
    augmentation = augment(recipe, splits, place.data, progress)
    encoder = Encoder(splits, augmentation, task, config, recipe.data, recipe.seed, place.data)
    folders = _folders(recipe, place, _start_fingerprint(recipe, source, splits, augmentation, threads))
    session = Session(recipe, place, progress, source, splits.labels, splits.notes, encoder, folders)
    rows = session.rows_after(0).train  # a tokenizer that can't be loaded is found before any work
    check_budgets(recipe, float(np.mean(rows["length"])))
    return session


def _curate(
    splits: Splits, task: Task, source: Path, recipe: Recipe, place: RunDirectory, progress: Progress
) -> Splits:
    def open_model() -> Model:
        labels = splits.labels if task.has_classes else None
        return load_pretrained(source, task.name, task.auto_class(), labels, recipe.trust_remote_code)

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
    """What a stage reads that is neither the run's data nor a stage: a teacher, a domain's texts, a language's."""
    if isinstance(spec, TrimVocabularySpec):
        return _describe([Path(file) for file in spec.corpora])
    if isinstance(spec, PretrainSpec) and spec.texts != "task":
        return _describe([Path(spec.texts)])
    if not isinstance(spec, FinetuneSpec) or not isinstance(spec.distill, DistillSpec):
        return []
    if spec.distill.teacher == "parent":
        return []
    place = locate(spec.distill.teacher)
    return _describe([*weight_files(place), *_companions(place)])


def _folders(recipe: Recipe, place: RunDirectory, start: str) -> tuple[StageFolder, ...]:
    folders: list[StageFolder] = []
    fingerprint = start
    for index, stage in enumerate(recipe.stages):
        fingerprint = digest([stage.model_dump(mode="json"), fingerprint, *_foreign_files(stage_spec(stage))])
        folders.append(place.stage(index, stage_kind(stage), fingerprint))
    return tuple(folders)
