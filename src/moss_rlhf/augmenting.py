"""A recipe's changed copies of the training rows: made once, kept in the run's folder, part of its fingerprint."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moss_rlhf.checking import check_augmentation, operation_names
from moss_rlhf.data import Splits
from moss_rlhf.files import digest, file_digest
from moss_rlhf.model.locate import locate, weight_files
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import RATES, AugmentSpec, Recipe
from moss_rlhf.strategy.augmentation import (
    Language,
    Operation,
    Rewriting,
    augmentation_facts,
    find_wordnet,
    load_back_translation,
    load_masked_words,
    make_copy,
    word_operations,
)
from moss_rlhf.strategy.augmentation.synonyms import FILES

if TYPE_CHECKING:
    from datasets import Dataset

_LANGUAGE_SAMPLE = 1000
_FORM = 1  # of the operations; a higher number makes older copies be made anew


@dataclass(frozen=True)
class Augmentation:
    """The copies, each a data set as long as train; a digest that names how they were made; facts for the report."""

    copies: tuple[Dataset, ...]
    digest: str
    facts: dict[str, Any]


def augment(recipe: Recipe, splits: Splits, cache: Path, progress: Progress) -> Augmentation | None:
    """Make the copies of the training rows that the recipe asks for, or take them from `cache`; None without any.

    raises   RecipeError, MachineError or ModelError on what can't be made, before any of it is.
    """
    spec = recipe.data.augment
    language = None if spec is None else check_augmentation(recipe, _sample(splits.train))
    if spec is None or language is None:
        return None
    name = digest([_FORM, _recipe_part(spec), language, recipe.seed, recipe.task, list(_versions(spec, language))])
    prefix = f"train-{digest([splits.digest, name])[:16]}"
    places = [cache / f"{prefix}-copy{number}.arrow" for number in range(1, spec.copies + 1)]
    operations: list[Operation] = []
    if not all(place.exists() for place in places):
        progress.say(f"augmenting train: {', '.join(operation_names(spec))} ({language})")
        operations = build_operations(spec, language)
    copies = tuple(
        make_copy(
            splits.train,
            operations,
            number=number,
            seed=recipe.seed,
            task=recipe.task,
            combine=spec.combine,
            cache_file=place,
        )
        for number, place in enumerate(places, 1)
    )
    facts = {"copies": spec.copies, "use": spec.use, "language": language, "operations": operation_names(spec)}
    return Augmentation(
        copies, digest([name, spec.copies, spec.use]), facts | augmentation_facts(splits.train, copies, recipe.task)
    )


def build_operations(spec: AugmentSpec, language: Language) -> list[Operation]:
    """The operations that a recipe asks for, models loaded: back-translation first, which wants clean texts."""
    operations: list[Operation] = []
    if spec.back_translation:
        pair = spec.back_translation
        rewriter = load_back_translation(pair.to, pair.back, pair.beams, pair.temperature)
        operations.append(Rewriting("back_translation", rewriter.rewrite))
    if spec.masked_lm:
        words = load_masked_words(spec.masked_lm.model, spec.masked_lm.share, spec.masked_lm.top_k, language)
        operations.append(Rewriting("masked_lm", words.rewrite))
    return [*operations, *word_operations({name: getattr(spec, name) for name in RATES}, language)]


def _sample(train: Dataset) -> list[str]:
    """Texts from all over the training rows, to tell their language by."""
    positions = np.unique(np.linspace(0, len(train) - 1, _LANGUAGE_SAMPLE).astype(int))
    rows = train.select(positions)
    return [text for values in rows[:].values() for text in values if isinstance(text, str)]


def _recipe_part(spec: AugmentSpec) -> dict[str, Any]:
    """What decides the copies' texts: not how many there are, nor who uses them."""
    return spec.model_dump(mode="json", exclude={"copies", "use", "language"})


def _versions(spec: AugmentSpec, language: Language) -> Iterator[str]:
    """Names of everything outside the recipe that decides the copies."""
    if language == "zh" and (spec.swap or spec.delete):
        yield importlib.metadata.version("jieba")
    if spec.synonym or spec.insert:
        read = find_wordnet()
        yield from (hashlib.sha256(read(name)).hexdigest() for name in FILES)
    models = [spec.masked_lm.model] if spec.masked_lm else []
    models += [spec.back_translation.to, spec.back_translation.back] if spec.back_translation else []
    for place in map(locate, models):
        yield from (file_digest(file) for file in [*weight_files(place), *sorted(place.glob("*.json"))])
