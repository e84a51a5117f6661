"""Plain texts of a file, without labels: what a language model is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from moss_rlhf.data.reading import Record
from moss_rlhf.data.sources import FileSource, Source, open_source
from moss_rlhf.errors import DataError
from moss_rlhf.recipe import SplitLayout

_COLUMN = "text"


def read_texts(path: str | Path, field: str = "texts", limit: int | None = None) -> list[str]:
    """The texts of a file, blank ones left out: of a txt each line, of the other formats the column `text`.

    field    where the path stands in a recipe, for messages.
    limit    read no more than so many.
    raises   DataError where the file is missing or broken, has no such column, or holds no text.
    """
    source = _open(path, field)
    texts = list(itertools.islice(_texts(source, field), limit))
    if not texts:
        raise DataError(f"{field}: {source.place} holds no text; give a file with one text a line.")
    return texts


def _open(path: str | Path, field: str) -> Source:
    try:
        return open_source("texts", SplitLayout(file=str(path)), ())  # no columns: a file of cells, not of documents
    except DataError as error:
        raise DataError(str(error).replace("data.texts", field)) from None


def _texts(source: Source, field: str) -> Iterator[str]:
    records = source.records()
    found: Iterator[str]
    if isinstance(source, FileSource) and source.kind == "txt":
        found = (source.delimiter.join(map(str, record.cells)) for record in _sound(records, source, field))
    else:
        found = _column(_sound(records, source, field), source, field)
    return (text for text in found if text.strip())


def _sound(records: Iterator[Record], source: Source, field: str) -> Iterator[Record]:
    for record in records:
        if record.fault:
            raise DataError(f"{field}: {source.place}, {source.unit} {record.line}: {record.fault}.")
        yield record


def _column(records: Iterator[Record], source: Source, field: str) -> Iterator[str]:
    names: list[str] = []
    for number, record in enumerate(records):
        if number == 0 and not source.named:
            names = [str(cell) for cell in record.cells]
            _refuse_without_column(names, source, field)
        elif source.named:
            _refuse_without_column([str(name) for name in record.cells], source, field)
            yield str(record.cells[_COLUMN] or "")
        elif len(record.cells) == len(names):
            yield str(record.cells[names.index(_COLUMN)] or "")
        else:
            raise DataError(
                f"{field}: {source.place}, {source.unit} {record.line}: {len(record.cells)} cells where the header has "
                f"{len(names)}. Quote cells that hold the delimiter, or mend the line."
            )


def _refuse_without_column(names: list[str], source: Source, field: str) -> None:
    if _COLUMN not in names:
        raise DataError(
            f"{field}: {source.place} has no column {_COLUMN!r}, only {', '.join(names[:8])}. Rename the one with the "
            "texts, or give a txt file with one text a line."
        )
