"""`clean`: rows in memory, without those that are not worth training on, and a list of what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moss_rlhf.data import Column
from moss_rlhf.data.cleaning import Finding, Part, clean_parts, kept_rows
from moss_rlhf.data.columns import label_of, text_names
from moss_rlhf.data.labels import label_name
from moss_rlhf.errors import DataError, RecipeError, nearest
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CleanSpec
from moss_rlhf.recipe.clean import Check
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.embedding import Embed, open_embedder

_SPLITS = ("train", "validation", "test")


@follows(CleanSpec, "clean")
def clean(
    rows: Any,
    *,
    empty: Check = "off",
    min_letters: int = 1,
    markup: Literal["off", "flag", "drop", "mend"] = "off",
    duplicates: Check = "off",
    conflicts: Check = "off",
    near_duplicates: Check = "off",
    leaks: Check = "off",
    threshold: float = 0.8,
    boilerplate: Check = "off",
    boilerplate_rows: int = 10,
    language: Check = "off",
    length: Check = "off",
    label_errors: Check = "off",
    label_method: Literal["neighbours", "confident"] = "neighbours",
    label_support: float = 0.85,
    folds: int = 5,
    task: str = "text-classification",
    model: str | Model | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Any, list[Finding]]:
    """Do the checks of a recipe's `data.clean`, each "off", "flag" (listed) or "drop" (and left out); docs/clean.md.

    rows      a list of mappings or a datasets.Dataset, with the task's columns, which counts as train; or several of
              them, {"train": …, "validation": …, "test": …}, as leaks wants them. Nothing is dropped from test.
    task      whose columns are looked at: text and label, text, or source and target. Other columns stay.
    model     a checkpoint or hub id whose embeddings compare texts; needed for label_errors.
    seed      of the folds of confident learning.
    returns   what is left, in the form that was given, and the findings; their `line` counts a split's rows from 1.
    raises    RecipeError on an option that a recipe could not hold, or that needs a label or a model; DataError where
              a column is missing, or a class of train or a whole split would go; MachineError on a missing package.
    """
    spec = CleanSpec(
        empty=empty,
        min_letters=min_letters,
        markup=markup,
        duplicates=duplicates,
        conflicts=conflicts,
        near_duplicates=near_duplicates,
        leaks=leaks,
        threshold=threshold,
        boilerplate=boilerplate,
        boilerplate_rows=boilerplate_rows,
        language=language,
        length=length,
        label_errors=label_errors,
        label_method=label_method,
        label_support=label_support,
        folds=folds,
    )
    columns = _columns(task)
    given = _splits(rows)
    parts = {name: _part(name, given[name], columns) for name in _SPLITS if name in given}
    _refuse_mixed(parts)
    embed = _embedder(model, label_errors != "off")
    progress = progress or Progress(quiet=True)
    findings = clean_parts(parts, spec, seed=seed, embed=embed, progress=progress, field="clean")
    kept = {name: kept_rows(given[name], part, text_names(columns)) for name, part in parts.items()}
    return (kept if isinstance(rows, Mapping) else kept["train"]), findings


def _columns(task: str) -> tuple[Column, ...]:
    if task not in TASKS:
        raise RecipeError(f"clean: task: there is no task {task!r}; {nearest(task, TASKS)}")
    return tuple(TASKS[task].columns)


def _splits(rows: Any) -> dict[str, Any]:
    """{split: its rows}; rows alone count as train."""
    given = dict(rows) if isinstance(rows, Mapping) else {"train": rows}
    for name in given:
        if name not in _SPLITS:
            raise RecipeError(f"clean: rows: there is no split {name!r}; {nearest(str(name), _SPLITS)}")
    if "train" not in given:
        raise RecipeError("clean: rows: train is missing, which says what is usual. Give {'train': rows, …}.")
    return given


def _part(name: str, rows: Any, columns: Sequence[Column]) -> Part:
    """A split's texts, several joined, and the names of its labels, None where it has no such column."""
    if len(rows) == 0:
        raise DataError(f"clean: {name} holds no row. Give at least one, or leave it out.")
    label = label_of(columns)
    cells = [[_text(row, column, name, number) for column in text_names(columns)] for number, row in enumerate(rows, 1)]
    labels = _labels(rows, label, name) if label is not None and label in rows[0] else None
    return Part.of(name, [" ".join(texts) for texts in cells], labels)


def _text(row: Mapping[str, Any], column: str, split: str, number: int) -> str:
    if column not in row:
        raise DataError(
            f"clean: {split} row {number} has no column {column!r}; its columns are {', '.join(map(str, row))}. "
            "Rename one, or give the task."
        )
    if not isinstance(row[column], str):
        raise DataError(f"clean: {split} row {number}: {column} is {row[column]!r}; it must be a text.")
    return str(row[column])


def _refuse_mixed(parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        if (part.labels is None) != (parts["train"].labels is None):
            raise DataError(f"clean: of train and {name} one has labels and the other none. Give both, or neither.")


def _labels(rows: Any, column: str, split: str) -> list[str]:
    names = [_label(row.get(column)) for row in rows]
    if "" in names:
        raise DataError(
            f"clean: {split} row {names.index('') + 1}: its {column} is no name and no number. Give each row one, or "
            "leave the column out."
        )
    return names


def _label(value: object) -> str:
    return label_name(value) if isinstance(value, str | int | float) else ""


def _embedder(model: str | Model | None, wanted: bool) -> Embed:
    if wanted and model is None:
        raise RecipeError("clean: model: is needed to compare texts for label_errors; give a checkpoint or hub id.")
    return open_embedder(model) if wanted and model is not None else _no_vectors


def _no_vectors(texts: Sequence[str]) -> Any:
    raise AssertionError("only label_errors compares vectors")
