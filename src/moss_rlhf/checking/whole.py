"""The whole check of a recipe, in the order in which a run would stumble. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moss_rlhf.checking.forecasts import Forecast, cache_notes, foretell
from moss_rlhf.checking.network import initial_state
from moss_rlhf.checking.rows import (
    check_augmentation,
    check_clean_folds,
    check_folds,
    check_labels,
    check_rows,
    left_for_later,
    rows_collected,
    token_lengths,
)
from moss_rlhf.checking.shapes import check_budgets
from moss_rlhf.checking.source import source_of
from moss_rlhf.checking.stages import check_output, check_stages
from moss_rlhf.data import DataCheck, check_data
from moss_rlhf.errors import RecipeError, UserError
from moss_rlhf.model.config import position_limit, read_config, trained_labels
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import Recipe, SearchSpec, candidates, settle_distillation, stage_spec, with_values
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.lengths import choose_max_length, length_facts, row_lengths


@dataclass(frozen=True)
class Check:
    """What was found; `tokens` are the lengths of each split, `trainings` how often a search trains all stages."""

    data: DataCheck
    tokens: dict[str, dict[str, float]]
    parameters: int
    stages: tuple[Forecast, ...]
    notes: tuple[str, ...]
    trainings: float = 1


def check(recipe: Recipe, progress: Progress | None = None) -> Check:
    """Validate everything that a run would stumble over, and foretell its stages.

    raises   UserError: the first fault found, in the order model, stages, output, data.
    """
    place = source_of(recipe)
    config = read_config(place)
    asked, recipe = recipe, settled(recipe)
    check_stages(recipe, place)
    check_candidates(recipe)
    check_output(recipe, place)
    check_rows(recipe)
    task = TASKS[recipe.task]
    known = trained_labels(config) if task.has_classes else None
    data = check_data(
        recipe.data, task.columns, seed=recipe.seed, known_labels=known, progress=progress or Progress(quiet=True)
    )
    check_labels(recipe, config, data.labels)
    check_augmentation(recipe, [text for row in data.samples["train"] for text in row])
    check_clean_folds(recipe, data.facts["train"].get("classes", {}))
    check_folds(recipe, data.facts["train"].get("classes", {}))
    lengths = {split: token_lengths(place, texts) for split, texts in data.samples.items()}
    limit = position_limit(config, float("inf"))
    wanted = recipe.data.max_length
    longest = choose_max_length(wanted, lengths["train"], task.longest(wanted, limit))
    tokens = {split: length_facts(values, longest, task.cuts) for split, values in lengths.items()}
    state = initial_state(place, config, recipe.task, len(data.labels))
    pieces = {split: row_lengths(values, longest, task.cuts) for split, values in lengths.items()}
    texts = rows_collected(recipe.data, {split: facts["rows"] for split, facts in data.facts.items()})
    rows = {split: round(count * len(pieces[split]) / len(lengths[split])) for split, count in texts.items()}
    check_budgets(recipe, float(np.mean(pieces["train"])))
    stages = tuple(foretell(recipe, state, config, rows, pieces["train"].tolist(), longest))
    mean = float(np.mean(pieces["train"]))
    notes = [
        *cache_notes(recipe, state, config, rows["train"], mean),
        *_decided(asked, recipe),
        *left_for_later(recipe),
    ]
    trainings = _trainings(recipe.search, rows["train"]) if recipe.search else 1
    return Check(data, tokens, state.parameters, stages, (*data.notes, *notes), trainings)


def check_candidates(recipe: Recipe) -> None:
    """Whether each value that a search may try could be run, the other fields being as they are.

    raises   RecipeError with the field and the value.
    """
    base = recipe.model_copy(update={"search": None})
    for field, choice in (recipe.search.space if recipe.search else {}).items():
        for value in candidates(choice):
            candidate = settled(with_values(base, {field: value}))
            try:
                check_stages(candidate, source_of(candidate))
                check_rows(candidate)
            except UserError as error:
                raise RecipeError(f"search.space.{field}: {value!r} can't be tried: {error}") from None


def _trainings(search: SearchSpec, rows: int) -> float:
    """How many trainings on all rows a search comes to, the last one counted."""
    part = min(1.0, search.rows / rows) if search.rows else 1.0
    return search.trials * part + search.seeds + 1


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what depends on the model decided: whether `distill: auto` finds a parent that was trained."""
    serves = not TASKS[recipe.task].has_classes or trained_labels(read_config(source_of(recipe))) is not None
    return settle_distillation(recipe, serves)


def _decided(asked: Recipe, recipe: Recipe) -> Iterator[str]:
    for index, (before, after) in enumerate(zip(asked.stages, recipe.stages, strict=True)):
        if before != after and stage_spec(after).distill is not None:
            yield f"stages.{index}.finetune learns from its parent (distill: auto; none turns it off)."
