"""Whether what `data` asks of the rows can be done, and how long they are. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_rlhf.checking.fields import field_of, training_of
from moss_rlhf.checking.source import named
from moss_rlhf.data import Column
from moss_rlhf.data.cleaning import check_packages, refuse_rare_classes
from moss_rlhf.data.collecting import read_examples
from moss_rlhf.data.columns import text_names
from moss_rlhf.errors import DataError, ModelError, RecipeError, nearest
from moss_rlhf.model.config import KEY, read_config, trained_labels
from moss_rlhf.model.locate import locate
from moss_rlhf.recipe import (
    RATES,
    AugmentSpec,
    DataSpec,
    DistillSpec,
    EnsembleSpec,
    FinetuneSpec,
    Recipe,
    TrimVocabularySpec,
    stage_spec,
)
from moss_rlhf.strategy.augmentation import check_masked_model, check_operations, check_translator, language_of
from moss_rlhf.strategy.augmentation.words import Language
from moss_rlhf.tasks import TASKS, TextClassification
from moss_rlhf.tasks.language import check_language_model
from moss_rlhf.tasks.overlap import has_sacrebleu


def check_rows(recipe: Recipe) -> None:
    """Whether what `data` asks of the rows can be done: for this task, with these packages."""
    check_packages(recipe.data.clean)
    example_texts(recipe.data, TASKS[recipe.task].columns)
    if recipe.data.collect and recipe.data.collect.perplexity:
        check_language_model(recipe.data.collect.perplexity, "data.collect.perplexity")
    if recipe.data.truncation != "head" and not isinstance(TASKS[recipe.task], TextClassification):
        raise RecipeError(
            f"data.truncation: {recipe.data.truncation} is for text classification; {recipe.task} reads texts from "
            "their head. Leave it out."
        )
    if not TASKS[recipe.task].has_classes and (field := _asks_for_labels(recipe)):
        raise RecipeError(f"{field}: wants labelled rows, and those of {recipe.task} have none. Leave it out.")


def example_texts(spec: DataSpec, columns: Sequence[Column]) -> list[str] | None:
    """The texts that data.collect looks for the like of; None where it has none.

    raises   DataError where a file of them is missing, or has no column such as train's.
    """
    like = spec.collect.like if spec.collect else None
    if not isinstance(like, str):
        return like
    given = (spec.columns.get(name, name) for name in text_names(columns))
    keys = [key for names in given for key in (names if isinstance(names, list) else [names])]
    return read_examples(like, [key if isinstance(key, str) else "text" for key in keys], "data.collect.like")


def _asks_for_labels(recipe: Recipe) -> str | None:
    """The first field of `data` that says something of labels."""
    clean = recipe.data.clean
    found = {
        "data.balance": recipe.data.balance != "none",
        "data.clean.conflicts": clean is not None and clean.conflicts != "off",
        "data.clean.label_errors": clean is not None and clean.label_errors != "off",
        "data.clean.ablate": clean is not None and clean.ablate,
    }
    return next((field for field, asked in found.items() if asked), None)


def left_for_later(recipe: Recipe) -> list[str]:
    """What moss run does to the rows before the first stage, and a check has not counted."""
    count = recipe.data.collect.count if recipe.data.collect else 0
    found = {
        f"data.collect has not been done yet: rows are those before it, times those of {count:,} rows.": count,
        "data.clean has not been done yet: rows are those before it.": recipe.data.clean and recipe.data.clean.checks,
        "trim_vocabulary: which words go is known once the texts are counted; parameters are those before it.": any(
            isinstance(stage_spec(stage), TrimVocabularySpec) for stage in recipe.stages
        ),
        "data.balance has not been done yet: rows are those before it.": recipe.data.balance != "none",
        "BLEU and chrF will be left out: sacrebleu is not installed (pip install 'moss-rlhf[translation]').": (
            recipe.task == "translation" and recipe.evaluate.translate > 0 and not has_sacrebleu()
        ),
    }
    return [sentence for sentence, holds in found.items() if holds]


def rows_collected(spec: DataSpec, rows: Mapping[str, int]) -> dict[str, int]:
    """{split: rows}, of which data.collect leaves its count at most, of each of its splits the same share."""
    every = sum(rows[split] for split in spec.corpus)
    if spec.collect is None or every <= spec.collect.count:
        return dict(rows)
    share = spec.collect.count / every
    return dict(rows) | {split: max(1, round(share * rows[split])) for split in spec.corpus}


def check_labels(recipe: Recipe, config: dict[str, Any], labels: Sequence[str]) -> None:
    """A checkpoint of ours serves the labels it was trained for, a teacher knows the same, and weights are for them."""
    if not TASKS[recipe.task].has_classes:
        return
    _check_enough(recipe, labels)
    for index, stage in enumerate(recipe.stages):
        spec, training = stage_spec(stage), training_of(stage_spec(stage))
        if training and training.loss and isinstance(training.loss.class_weights, dict):
            _check_weights(training.loss.class_weights, labels, f"{field_of(index, stage)}.loss.class_weights")
        if (
            isinstance(spec, FinetuneSpec)
            and isinstance(spec.distill, DistillSpec)
            and spec.distill.teacher != "parent"
        ):
            taught = trained_labels(read_config(locate(spec.distill.teacher)))
            if taught is None or list(taught) != list(labels):
                raise ModelError(
                    f"stages.{index}.finetune.distill.teacher: {spec.distill.teacher} was trained for the labels "
                    f"{', '.join(taught or ('(none)',))}; the data has {', '.join(labels)}. Give one of the same "
                    "labels in the same order."
                )
    known = trained_labels(config)
    if KEY in config and known is not None and set(known) != set(labels):
        raise ModelError(
            f"model: {named(recipe)} was trained for the labels {', '.join(known)}; the data has {', '.join(labels)}. "
            "Give data with the same labels (data.labels renames them), or start from the pretrained model."
        )


def check_augmentation(recipe: Recipe, texts: Sequence[str]) -> Language | None:
    """Whether the copies asked for can be made of such texts on this machine; returns the language, None without any.

    raises   RecipeError, MachineError or ModelError on what the language, the machine or a model can't do; RecipeError
             where the copies are for a teacher and no stage has one.
    """
    spec = recipe.data.augment
    if spec is None:
        return None
    if spec.use == "distill" and not any(trains_on_copies(spec, stage_spec(stage)) for stage in recipe.stages):
        raise RecipeError(
            "data.augment.use: distill wants a stage with a teacher, and no finetune has distill. "
            "Give one distill, or set use: always."
        )
    language = language_of(spec.language, texts)
    check_operations(operation_names(spec), language, recipe.task)
    if spec.masked_lm:
        check_masked_model(spec.masked_lm.model)
    if spec.back_translation:
        check_translator(spec.back_translation.to, "to")
        check_translator(spec.back_translation.back, "back")
    return language


def operation_names(spec: AugmentSpec) -> list[str]:
    """The operations that a recipe asks for, by their fields."""
    models = [name for name in ("masked_lm", "back_translation") if getattr(spec, name)]
    return [*(name for name in RATES if getattr(spec, name)), *models]


def trains_on_copies(augment: AugmentSpec | None, spec: object) -> bool:
    """Whether a stage trains on the augmented copies: every fine-tuning, or only those with a teacher.

    An ensemble of seeds does, too, where it is every one; of folds, a row's copies would stand on both sides.
    """
    if augment is not None and isinstance(spec, EnsembleSpec):
        return augment.use == "always" and spec.by == "seeds"
    if augment is None or not isinstance(spec, FinetuneSpec):
        return False
    return augment.use == "always" or isinstance(spec.distill, DistillSpec)


def _check_enough(recipe: Recipe, labels: Sequence[str]) -> None:
    """No part of the rows that is asked for is smaller than a row of each class."""
    asked = {
        "search.rows": recipe.search.rows if recipe.search else None,
        "data.collect.count": recipe.data.collect.count if recipe.data.collect else None,
    }
    for field, count in asked.items():
        if count is not None and count < len(labels):
            raise RecipeError(f"{field}: {count} is less than a row of each of {len(labels)} classes. Give more.")


def _check_weights(weights: Mapping[str, float], labels: Sequence[str], field: str) -> None:
    for label in weights:
        if label not in labels:
            raise RecipeError(f"{field}: the data has no label {label!r}; {nearest(label, labels)}")


def check_clean_folds(recipe: Recipe, classes: Mapping[str, int]) -> None:
    """Every class of train has a row for each fold of confident learning; of a corpus, the choice will tell."""
    if recipe.data.collect is None:
        refuse_rare_classes(recipe.data.clean, classes)


def check_folds(recipe: Recipe, classes: Mapping[str, int]) -> None:
    """Every class of train has a row for each fold of an ensemble. classes: {label: rows of train}."""
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if not isinstance(spec, EnsembleSpec) or spec.by != "folds":
            continue
        for label, count in classes.items():
            if 0 < count < spec.members:
                raise DataError(
                    f"stages.{index}.ensemble.members: {spec.members} folds, but train has only {count} of the "
                    f"class {label!r}, and each fold needs one. Give {f'at most {count}, or ' * (count > 1)}by: seeds."
                )


def token_lengths(place: Path, rows: Sequence[Sequence[str]]) -> list[int]:
    """Tokens of the longest text of each row."""
    columns = [_text_lengths(place, column) for column in zip(*rows, strict=True)]
    return [max(lengths) for lengths in zip(*columns, strict=True)]


def _text_lengths(place: Path, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included; by the fast tokenizer's file, else about four characters a token."""
    file = place / "tokenizer.json"
    if not file.exists():
        return [max(3, len(text) // 4) for text in texts]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ModelError(f"model: {file} is broken ({error}). Fetch or save the checkpoint again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]
