"""Which cells are the task's columns, and whether the first line names them: found out or asked, never guessed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from moss_rlhf.data.columns import Column, label_of, text_names
from moss_rlhf.data.labels import label_name
from moss_rlhf.data.reading import Record
from moss_rlhf.data.sources import Source, open_source
from moss_rlhf.errors import DataError, nearest
from moss_rlhf.recipe import SplitLayout
from moss_rlhf.recipe.data import ColumnReference

HEAD_ROWS = 1000
_LONGEST_LABEL = 40
Key = int | str


@dataclass(frozen=True)
class Asked:
    """What the recipe says of a split's layout; `field` and `columns_field` are its places, for messages."""

    field: str
    columns_field: str
    header: bool | None
    references: Mapping[str, ColumnReference]


@dataclass(frozen=True)
class Layout:
    """Where the standard columns stand.

    columns  {standard name: keys of the cells that are joined}
    header   the first record names the columns and is no row
    width    cells of every record; None where cells have names
    words    for people: 'tsv, no header; text = column 0, label = column 1'
    found    by looking at the rows: neither the recipe nor the file says so
    """

    columns: dict[str, tuple[Key, ...]]
    header: bool
    width: int | None
    words: str
    found: bool = False


def find_layout(source: Source, head: Sequence[Record], asked: Asked, columns: Sequence[Column]) -> Layout:
    """The layout of a source whose first records are `head`.

    raises  DataError where a column is missing, or there is more than one way to see the columns, or none.
    """
    _check_references(asked, columns)
    if source.named:
        return _by_name(source, head, asked, columns)
    named = any(isinstance(key, str) for reference in asked.references.values() for key in _keys(reference))
    if named and asked.header is False:
        raise DataError(
            f"{asked.columns_field}: columns given by name need a header, and {asked.field}.header is false."
        )
    if asked.header or named:
        return _with_header(source, head, asked, columns)
    if asked.references:
        return _at_positions(source, head, asked, columns)
    if asked.header is None and _holds_standard_names(head[0], columns):
        return _with_header(source, head, asked, columns)
    return _by_looking(source, head, asked, columns)


def _check_references(asked: Asked, columns: Sequence[Column]) -> None:
    names = [column.name for column in columns]
    for name, reference in asked.references.items():
        if name not in names:
            raise DataError(f"{asked.columns_field}.{name}: is no column of this task; {nearest(name, names)}")
        if not _keys(reference) or (name == label_of(columns) and len(_keys(reference)) > 1):
            rule = "a label is one column, a text one or several"
            raise DataError(f"{asked.columns_field}.{name}: {reference} can't be used; {rule}.")


def _keys(reference: ColumnReference) -> list[Key]:
    return list(reference) if isinstance(reference, list) else [reference]


def _holds_standard_names(first: Record, columns: Sequence[Column]) -> bool:
    return {column.name.lower() for column in columns} <= {str(cell).strip().lower() for cell in first.cells}


# --- columns that have names ---------------------------------------------------------------------------------------


def _by_name(source: Source, head: Sequence[Record], asked: Asked, columns: Sequence[Column]) -> Layout:
    names = list(dict.fromkeys(str(name) for record in head for name in record.cells))
    found = {column.name: _named_keys(source.place, column, asked, names) for column in columns}
    keys: dict[str, tuple[Key, ...]] = {
        name: tuple(names[index] for index in indices) for name, indices in found.items()
    }
    if source.documents is not None:  # the source named its one column itself
        return Layout(keys, False, None, f"{source.kind}, {source.documents.words}", source.documents.found)
    return Layout(keys, False, None, f"{source.kind}; {_in_words(keys)}")


def _named_keys(place: str, column: Column, asked: Asked, names: Sequence[str]) -> tuple[int, ...]:
    keys = _keys(asked.references.get(column.name, column.name))
    for key in keys:
        if isinstance(key, int):
            rule = "the columns of this format have names; give one of " + ", ".join(names)
            raise DataError(f"{asked.columns_field}.{column.name}: {key} is a position, and {rule}.")
    return tuple(_position_of(str(key), names, place, asked, column.name) for key in keys)


def _with_header(source: Source, head: Sequence[Record], asked: Asked, columns: Sequence[Column]) -> Layout:
    names = [str(cell).strip() for cell in head[0].cells]
    found: dict[str, tuple[Key, ...]] = {}
    for column in columns:
        keys = _keys(asked.references.get(column.name, column.name))
        found[column.name] = tuple(
            _in_range(key, len(names), asked, column.name)
            if isinstance(key, int)
            else _position_of(key, names, f"{source.place}, line {head[0].line}", asked, column.name)
            for key in keys
        )
    words = _in_words({name: tuple(names[int(key)] for key in keys) for name, keys in found.items()})
    return Layout(found, True, len(names), f"{source.kind}, header; {words}")


def _position_of(name: str, names: Sequence[str], place: str, asked: Asked, column: str) -> int:
    """Where a name stands; a standard name that the recipe does not give is found in any case."""
    found = [index for index, known in enumerate(names) if known == name]
    if not found and column not in asked.references:
        found = [index for index, known in enumerate(names) if known.lower() == name.lower()]
    if len(found) > 1:
        raise DataError(f"{place}: {len(found)} columns are named {name!r}; rename one, or give a position.")
    if not found:
        remedy = f"set {asked.columns_field}.{column} to one of them"
        raise DataError(f"{place}: there is no column {name!r}; {nearest(name, names)} If one of them is it, {remedy}.")
    return found[0]


def _in_range(position: int, width: int, asked: Asked, column: str) -> int:
    if not 0 <= position < width:
        rule = f"the first row has {width} cells, counted from 0"
        raise DataError(f"{asked.columns_field}.{column}: there is no column {position}; {rule}.")
    return position


# --- columns that have positions -----------------------------------------------------------------------------------


def _at_positions(source: Source, head: Sequence[Record], asked: Asked, columns: Sequence[Column]) -> Layout:
    width = _usual_width(head)
    found: dict[str, tuple[Key, ...]] = {}
    for column in columns:
        if column.name not in asked.references:
            raise DataError(
                f"{asked.columns_field}.{column.name}: is missing; give its position, from 0, as for the others."
            )
        keys = _keys(asked.references[column.name])
        found[column.name] = tuple(_in_range(int(key), width, asked, column.name) for key in keys)
    label = label_of(columns)
    if asked.header is None and label is not None:
        _refuse_unclear_header(source, head, asked, int(found[label][0]))
    if asked.header is None and label is None:
        _refuse_unsaid_header(source, head, asked)
    return Layout(found, False, width, f"{source.kind}, no header; {_in_words(found)}")


def _refuse_unsaid_header(source: Source, head: Sequence[Record], asked: Asked) -> None:
    """Texts don't repeat as labels do, so nothing tells a first row from the names of the columns."""
    shown = ", ".join(_short(str(cell)) for cell in head[0].cells)
    remedy = f"Set {asked.field}.header: true if it names the columns, or false if it is a row"
    raise DataError(f"{source.place}, line {head[0].line}: {shown} may be a row or the columns' names. {remedy}.")


def _refuse_unclear_header(source: Source, head: Sequence[Record], asked: Asked, label: int) -> None:
    rows = _whole_rows(head, _usual_width(head))
    if len(head[0].cells) <= label or not _occurs_again(head[0].cells[label], [row[label] for row in rows[1:]]):
        value = head[0].cells[label] if len(head[0].cells) > label else ""
        rule = f"does not occur again in the first {HEAD_ROWS:,} rows: it may be the name of a column"
        remedy = f"Set {asked.field}.header: true if line {head[0].line} names the columns, or false if it is a row"
        raise DataError(f"{source.place}, line {head[0].line}: the label {value!r} {rule}. {remedy}.")


def _occurs_again(value: str, others: Sequence[str]) -> bool:
    return label_name(value) in {label_name(other) for other in others}


def _usual_width(head: Sequence[Record]) -> int:
    return Counter(len(record.cells) for record in head).most_common(1)[0][0]


def _whole_rows(head: Sequence[Record], width: int) -> list[list[str]]:
    return [[str(cell) for cell in record.cells] for record in head if len(record.cells) == width]


# --- columns found by looking --------------------------------------------------------------------------------------


class _Candidates(NamedTuple):
    texts: list[int]
    labels: list[int]
    pairs: list[tuple[int, int]]


def _by_looking(source: Source, head: Sequence[Record], asked: Asked, columns: Sequence[Column]) -> Layout:
    width = _usual_width(head)
    rows = _whole_rows(head, width)
    first, body = rows[0], rows[1:] if asked.header is None else rows
    pairs = _candidates(body).pairs
    texts, label_column = text_names(columns), label_of(columns)
    if label_column is None and len(texts) == width == 1:
        return Layout({texts[0]: (0,)}, False, 1, f"{source.kind}, no header; one column, {texts[0]}", found=True)
    if label_column is None or len(pairs) != 1 or len(texts) != 1:
        raise DataError(_unclear(source, first, body, asked, columns))
    text, label = pairs[0]
    if asked.header is None and not _occurs_again(first[label], [row[label] for row in body]):
        raise DataError(_unknown_header(source, first, pairs[0], asked, (texts[0], label_column)))
    found: dict[str, tuple[Key, ...]] = {texts[0]: (text,), label_column: (label,)}
    return Layout(found, False, width, f"{source.kind}, no header; {_in_words(found)}", found=True)


def _candidates(rows: Sequence[Sequence[str]]) -> _Candidates:
    """Columns that may be the text or the label, and the pairs (text, label) among them.

    A label: few short values that repeat. A text: mostly distinct; where some columns hold running words, only those.
    In a pair the text is the longer one.
    """
    columns = list(zip(*rows, strict=True))
    lengths = [sum(map(len, column)) for column in columns]
    labels = [index for index, column in enumerate(columns) if _looks_like_label(column)]
    distinct = [index for index, column in enumerate(columns) if 2 * len(set(column)) > len(column)]
    texts = [index for index in distinct if _has_words(columns[index])] or distinct
    pairs = [(text, label) for text in texts for label in labels if lengths[text] > lengths[label] and text != label]
    return _Candidates(texts, labels, pairs)


def _looks_like_label(cells: Sequence[str]) -> bool:
    values = {label_name(cell) for cell in cells}
    few = len(values) < len(cells) and len(values) <= max(2, len(cells) // 2)
    return few and max(map(len, values)) <= _LONGEST_LABEL


def _has_words(cells: Sequence[str]) -> bool:
    """Whether half of the cells hold more than one word, or letters of a script that does not part them."""
    return 2 * sum(len(cell.split()) > 1 or not cell.isascii() for cell in cells) >= len(cells)


def _unclear(
    source: Source, first: Sequence[str], body: Sequence[Sequence[str]], asked: Asked, columns: Sequence[Column]
) -> str:
    names = " and ".join(repr(column.name) for column in columns)
    if len(first) == 1:
        remedy = f"set {asked.field}.delimiter if the cells are parted by something else, or {asked.field}.format"
        return f"{source.place}: every row has one cell, {_short(first[0])}, and {names} are needed; {remedy}."
    shown = "; ".join(
        f"column {index}: {', '.join(_short(row[index]) for row in [first, *body[:2]])} …"
        for index in range(len(first))
    )
    example = ", ".join(f"{column.name}: {index}" for index, column in enumerate(columns))
    remedy = f"set {asked.columns_field}, as in {{{example}}}, or by the names in the first line"
    return f"{source.place}: the columns {names} can't be told for sure ({shown}); {remedy}."


def _unknown_header(
    source: Source, first: Sequence[str], pair: tuple[int, int], asked: Asked, names: tuple[str, str]
) -> str:
    by_name = f"{{{names[0]}: {first[pair[0]].strip()}, {names[1]}: {first[pair[1]].strip()}}}"
    by_position = f"{{{names[0]}: {pair[0]}, {names[1]}: {pair[1]}}}"
    shown = ", ".join(map(_short, first))
    by_row = f"if it is a row, {asked.columns_field}: {by_position} and header: false"
    remedy = f"set {asked.columns_field}: {by_name}, or, {by_row}"
    return (
        f"{source.place}: the first line ({shown}) seems to name the columns, none of them as the task does; {remedy}."
    )


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= 30 else cell[:29] + "…")


def _in_words(columns: Mapping[str, Sequence[Key]]) -> str:
    return ", ".join(f"{name} = {' + '.join(map(_key_in_words, keys))}" for name, keys in columns.items())


def _key_in_words(key: Key) -> str:
    return f"column {key}" if isinstance(key, int) else repr(key)


# --- for `moss init` -----------------------------------------------------------------------------------------------


_CLASSIFICATION = (Column("text", "text"), Column("label", "label"))


@dataclass(frozen=True)
class Sniffed:
    """What a data file looks like.

    columns   its columns: names, or positions where there is no header
    header    whether the first line names them; None for formats whose columns always have names
    texts     columns that may be the text; labels: that may be the label
    pairs     (text, label): the ways to see both
    """

    file: str
    columns: tuple[Key, ...]
    header: bool | None
    texts: tuple[Key, ...]
    labels: tuple[Key, ...]
    pairs: tuple[tuple[Key, Key], ...]

    def data_section(self) -> dict[str, Any]:
        """The recipe's `data`: {"train": …, "columns": {"text": …, "label": …}}.

        raises  DataError where there is not exactly one way to see the columns.
        """
        if len(self.pairs) != 1:
            rule = f"texts may be {list(self.texts)}, labels {list(self.labels)}"
            remedy = "write data.columns: {text: …, label: …} yourself"
            raise DataError(f"{self.file}: the text and the label can't be told for sure; {rule}. {remedy}.")
        text, label = self.pairs[0]
        train: Any = {"file": self.file, "header": False} if self.header is False else self.file
        return {"train": train, "columns": {"text": text, "label": label}}


def sniff(path: str | Path) -> Sniffed:
    """Look at the first 1,000 rows of a data file for a text classification's columns.

    raises  DataError where the file can't be read or holds no rows.
    """
    source = open_source("train", SplitLayout(file=str(path)), _CLASSIFICATION)
    head = read_head(source)
    if source.named:
        names = list(dict.fromkeys(str(name) for record in head for name in record.cells))
        rows = [[_as_cell(record, name) for name in names] for record in head]
        return _sniffed(source, tuple(names), None, rows)
    rows = _whole_rows(head, _usual_width(head))
    header = _has_header(head[0], rows)
    keys: tuple[Key, ...] = tuple(cell.strip() for cell in rows[0]) if header else tuple(range(len(rows[0])))
    return _sniffed(source, keys, header, rows[1:] if header else rows)


def _sniffed(source: Source, keys: tuple[Key, ...], header: bool | None, rows: list[list[str]]) -> Sniffed:
    found = _candidates(rows)
    lower = [str(key).lower() for key in keys]
    pairs = found.pairs
    if lower.count("text") == 1 and lower.count("label") == 1:
        pairs = [(lower.index("text"), lower.index("label"))]
    texts, labels = (tuple(keys[index] for index in indices) for indices in (found.texts, found.labels))
    return Sniffed(source.place, keys, header, texts, labels, tuple((keys[text], keys[label]) for text, label in pairs))


def _has_header(first: Record, rows: Sequence[Sequence[str]]) -> bool:
    """Standard names, or a first value in every column that looks like labels that never occurs again."""
    if _holds_standard_names(first, _CLASSIFICATION):
        return True
    body = rows[1:]
    labels = _candidates(body).labels
    return bool(labels) and not any(_occurs_again(rows[0][label], [row[label] for row in body]) for label in labels)


def _as_cell(record: Record, name: str) -> str:
    value = record.cells[name] if name in list(record.cells) else None
    return "" if value is None else str(value)


def read_head(source: Source, skip_broken: bool = False) -> list[Record]:
    """The first records, one more than HEAD_ROWS for a header.

    raises  DataError for an empty source, and for a broken record unless those are skipped.
    """
    head = []
    with closing(source.records()) as records:
        for record in islice(records, HEAD_ROWS + 1):
            if record.fault and not skip_broken:
                raise DataError(broken_message(source, record.line, record.fault))
            if not record.fault:
                head.append(record)
    if not head:
        raise DataError(f"{source.place}: is empty; it must hold a row a line.")
    return head


def broken_message(source: Source, line: int, fault: str) -> str:
    """The sentence for a line that can't be used."""
    return f"{source.place}, {source.unit} {line}: {fault}. Correct it, or set data.broken_lines: skip."
