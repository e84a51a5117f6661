"""Texts chosen out of train, and of a share held out of it → splits without the others, and a list of the choice."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.cleaning.finding import shorten
from moss_rlhf.data.collecting import Candidate, CorpusRow
from moss_rlhf.data.columns import Column, label_of, text_names
from moss_rlhf.data.reading import BATCH_ROWS
from moss_rlhf.data.scanning import text_digest
from moss_rlhf.data.splits import Splits
from moss_rlhf.errors import DataError
from moss_rlhf.files import digest, new_file

_SHOWN = 50
_LEAST_CLASSES = 2


@dataclass(frozen=True)
class Chosen:
    """A row that stays, by its position among the rows of all parts; `score` and `reason` are its text's."""

    row: int
    score: float
    reason: str


@dataclass(frozen=True)
class Listed:
    """A chosen row as people look it up; `line` of its file, as an editor counts."""

    split: str
    line: int
    label: str
    score: float
    reason: str
    text: str


def corpus_rows(splits: Splits, columns: Sequence[Column], parts: Sequence[str]) -> Iterator[CorpusRow]:
    """The rows of the parts, one part after the other, by their position; several text columns are joined."""
    texts = chain.from_iterable(_texts(getattr(splits, part), columns) for part in parts)
    return ((position, text, {}) for position, text in enumerate(texts))


def _texts(rows: Any, columns: Sequence[Column]) -> Iterator[str]:
    names = text_names(columns)
    for batch in rows.select_columns(names).iter(BATCH_ROWS):
        yield from map(" ".join, zip(*(batch[name] for name in names), strict=True))


def rows_of_texts(candidates: Sequence[Candidate], rows: Iterable[CorpusRow]) -> list[Chosen]:
    """Every row with a chosen text, in the order of the choice: its copies too, so that cleaning sees them."""
    ranks = {text_digest([candidate.text]): rank for rank, candidate in enumerate(candidates)}
    names = ((row, text_digest([text])) for row, text, _ in rows)
    found = sorted((ranks[name], row) for row, name in names if name in ranks)
    return [Chosen(row, round(candidates[rank].score, 6), candidates[rank].reason) for rank, row in found]


def keep_chosen(
    splits: Splits, columns: Sequence[Column], parts: Sequence[str], chosen: Sequence[Chosen], by: str
) -> tuple[Splits, list[Listed]]:
    """The splits with only the chosen rows in `parts`, and these listed in the order given.

    by       what chose them, in words.
    raises   DataError where a part would be left without rows, or train with one class.
    """
    places = [_place(splits, parts, entry.row) for entry in chosen]
    listed = [_listed(splits, columns, *place, entry) for place, entry in zip(places, chosen, strict=True)]
    kept = splits
    for part in parts:
        rows = np.sort(np.array([row for name, row in places if name == part], dtype=np.int64))
        kept = _with_rows(kept, columns, part, rows, [entry for entry in listed if entry.split == part], by)
    _refuse_emptied(kept, parts)
    return replace(kept, notes=(*kept.notes, *_notes(splits, kept, parts))), listed


def _place(splits: Splits, parts: Sequence[str], row: int) -> tuple[str, int]:
    """The part that a position lies in, and which of its rows it is."""
    for part in parts:
        if row < (size := len(getattr(splits, part))):
            return part, row
        row -= size
    raise AssertionError("a position behind the last row")


def _listed(splits: Splits, columns: Sequence[Column], part: str, row: int, chosen: Chosen) -> Listed:
    cells, label = getattr(splits, part)[row], label_of(columns)
    text = " ".join(cells[name] for name in text_names(columns))
    name = splits.labels[cells[label]] if splits.labels and label is not None else ""
    return Listed(part, splits.line(part, row), name, chosen.score, chosen.reason, shorten(text))


def _with_rows(
    splits: Splits, columns: Sequence[Column], part: str, rows: NDArray[np.int64], listed: Sequence[Listed], by: str
) -> Splits:
    before: Any = getattr(splits, part)
    kept = before.select(rows)
    origins = dict(splits.origins)
    if part in origins:
        origins[part] = replace(origins[part], lines=origins[part].lines[rows])
    facts = splits.facts[part] | _facts(splits, columns, part, kept)
    facts["collected"] = {"of": len(before), "chosen": len(rows), "by": by, "examples": _examples(listed)}
    return replace(
        splits,
        **{part: kept},
        facts=splits.facts | {part: facts},
        digest=digest([splits.digest, part, hashlib.sha256(rows.tobytes()).hexdigest()]),
        origins=origins,
    )


def _facts(splits: Splits, columns: Sequence[Column], part: str, kept: Any) -> dict[str, Any]:
    """What a split's facts say of its rows, of those that stay."""
    gone, before, label = len(getattr(splits, part)) - len(kept), splits.facts[part], label_of(columns)
    facts = {
        "rows": len(kept),
        "dropped": before["dropped"] | ({"not collected": gone} if gone else {}),
        "duplicates": len(kept) - len({text_digest([text]) for text in _texts(kept, columns)}),
    }
    if "classes" not in before:
        return facts
    counts = np.bincount(np.array(kept[label][:], dtype=np.int64), minlength=len(splits.labels))
    return facts | {"classes": dict(zip(splits.labels, counts.tolist(), strict=True))}


def _examples(listed: Sequence[Listed]) -> list[dict[str, Any]]:
    return [{name: value for name, value in asdict(entry).items() if name != "split"} for entry in listed[:_SHOWN]]


def _refuse_emptied(kept: Splits, parts: Sequence[str]) -> None:
    chosen = sum(len(getattr(kept, part)) for part in parts)
    for part in parts:
        if len(getattr(kept, part)) == 0:
            remedy = "Give a larger count" + (", or a validation file" if part == "validation" else "")
            raise DataError(f"data.collect: of {chosen} rows chosen none is of {part}. {remedy}.")
    classes = kept.facts["train"].get("classes")
    if classes is not None and sum(count > 0 for count in classes.values()) < _LEAST_CLASSES:
        counts = ", ".join(f"{label}: {count}" for label, count in classes.items())
        raise DataError(
            f"data.collect: the rows chosen for train are of one class ({counts}); a classifier needs two. Give a "
            "larger count, more diversity, or examples and keywords of every class."
        )


def _notes(before: Splits, kept: Splits, parts: Sequence[str]) -> Iterator[str]:
    for part in parts:
        chosen, every = len(getattr(kept, part)), len(getattr(before, part))
        yield f"{part}: data.collect chose {chosen} of {every} rows; collected.csv lists them."
    for label, count in kept.facts["train"].get("classes", {}).items():
        if count == 0 and before.facts["train"]["classes"][label]:
            yield f"train: no row of the class {label!r} was collected."


def write_collected(listed: Sequence[Listed], place: Path) -> None:
    """All chosen rows as a csv file with a header, the first chosen first."""
    with new_file(place) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Listed)])
        writer.writeheader()
        writer.writerows(map(asdict, listed))
