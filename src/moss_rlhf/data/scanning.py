"""Records → rows of the task's columns, in one pass that leaves 20 bytes a row in memory and never a text."""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.columns import Column, label_of
from moss_rlhf.data.labels import is_score, label_name
from moss_rlhf.data.layout import Asked, Layout, broken_message, find_layout, read_head
from moss_rlhf.data.reading import BATCH_ROWS, Record
from moss_rlhf.data.sources import Source, open_source, split_layout
from moss_rlhf.errors import DataError
from moss_rlhf.files import digest
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec, SplitLayout

DIGEST_BYTES = 16
MOST_CLASSES = 1000
_FEW_ROWS = 20
_FORM = 3  # of the cached files; a higher number makes older ones be written anew
_BROKEN_SHOWN = 3


class Row(NamedTuple):
    """A row that can be used: its text columns in the task's order and the name of its label, where it has one."""

    line: int
    texts: tuple[str, ...]
    label: str | None


@dataclass
class Broken:
    """Lines that can't be used: an error, or counted, the first of them with their places."""

    skip: bool
    count: int = 0
    places: list[str] = field(default_factory=list)

    def meet(self, source: Source, line: int, fault: str) -> None:
        if not self.skip:
            raise DataError(broken_message(source, line, fault))
        self.count += 1
        if len(self.places) < _BROKEN_SHOWN:
            self.places.append(f"{source.unit} {line} {fault}")


@dataclass(frozen=True)
class SplitFile:
    """A split ready to be read: where its rows are and how they become the task's columns."""

    split: str
    source: Source
    layout: Layout
    columns: tuple[Column, ...]
    renamed: Mapping[str, str]
    skip_broken: bool

    def digest(self) -> str:
        """Names what `read_rows` gives: the content and everything that decides how it is read."""
        keys = {name: list(keys) for name, keys in self.layout.columns.items()}
        layout = [keys, self.layout.header, self.layout.width, self.layout.words]
        return digest([_FORM, self.source.digest(), layout, dict(self.renamed), self.skip_broken])


@dataclass(frozen=True)
class Labels:
    """The labels of a split's rows.

    names, lines   in order of first appearance, and the line (or row) of each
    positions      (rows,) int32, in `names`
    """

    names: list[str]
    lines: list[int]
    positions: NDArray[np.int32]


@dataclass(frozen=True)
class Scan:
    """What one pass over a split's rows found out.

    labels         None where the task has none
    digests        (rows, 2) uint64, equal for equal texts (outer white space stripped)
    broken         lines skipped; `broken_places`: the first three
    markup         rows whose text holds remnants of HTML, such as <br /> or #39;
    """

    place: str
    layout: str
    found: bool
    unit: str
    labels: Labels | None
    digests: NDArray[np.uint64]
    broken: int
    broken_places: list[str]
    markup: int


_MARKUP = re.compile(r"</?[a-zA-Z]+ ?/?>|&[a-zA-Z]+;|&?#\d+;")

Keep = Callable[[Row, int, bytes], None]
"""Takes a row, its label's position (0 where the task has no labels) and its texts' digest."""


def open_splits(spec: DataSpec, columns: Sequence[Column]) -> dict[str, SplitFile]:
    """Every split that has rows of its own; 'validation' is missing where it is a share of train.

    raises  DataError where a source can't be opened or its layout is not clear.
    """
    given = [split for split in ("train", "validation", "test") if isinstance(getattr(spec, split), str | SplitLayout)]
    return {split: open_split(split, spec, columns) for split in given}


def open_split(split: str, spec: DataSpec, columns: Sequence[Column]) -> SplitFile:
    """One split that has rows of its own, ready to be read."""
    layout = split_layout(split, getattr(spec, split))
    if label_of(columns) is None:
        _refuse_labels(split, layout, spec)
    references = layout.columns if layout.files else layout.columns or spec.columns
    source = open_source(split, layout, columns, cut=bool(references))
    columns_field = f"data.{split}.columns" if layout.columns else "data.columns"
    asked = Asked(f"data.{split}", columns_field, layout.header, references)
    skip = spec.broken_lines == "skip"
    found = find_layout(source, read_head(source, skip), asked, columns)
    renamed = {label_name(value): label_name(name) for value, name in (layout.labels or spec.labels).items()}
    return SplitFile(split, source, found, tuple(columns), renamed, skip)


def _refuse_labels(split: str, layout: SplitLayout, spec: DataSpec) -> None:
    given = {f"data.{split}.labels": layout.labels, "data.labels": spec.labels}
    for place, names in given.items():
        if names:
            raise DataError(f"{place}: {dict(names)} renames labels, and this task has none; leave it out.")


def scan_rows(file: SplitFile, keep: Keep, progress: Progress) -> Scan:
    """Read a split once, giving each row, its label's position and its text's digest to `keep`.

    raises  DataError for what makes the rows unusable: nothing to read, a broken line, scores for labels.
    """
    broken, tally = Broken(file.skip_broken), _Tally(label_of(file.columns) is not None)
    with progress.bar(f"reading {file.split}", None) as bar:
        for row in read_rows(file, broken):
            keep(row, *tally.add(row, file))
            if tally.rows % BATCH_ROWS == 0:
                bar.advance(BATCH_ROWS)
    _check_rows(file, tally.rows, broken)
    if tally.labels is not None:
        _check_labels(file, len(tally.labels.lines), tally.rows)
    return tally.scan(file, broken)


class _LabelTally:
    """Grows with the rows: a position each, and a line for each label."""

    def __init__(self) -> None:
        self.lines: dict[str, int] = {}
        self.known: dict[str, int] = {}
        self.positions = array("i")

    def add(self, label: str, line: int, file: SplitFile) -> int:
        """The label's position."""
        if label not in self.known:
            self.known[label] = len(self.known)
            self.lines[label] = line
            _check_class_count(file, len(self.known))
        self.positions.append(self.known[label])
        return self.positions[-1]

    def labels(self) -> Labels:
        return Labels(list(self.lines), list(self.lines.values()), np.frombuffer(self.positions, dtype=np.int32))


class _Tally:
    """Grows with the rows: a digest each, and their labels where the task has some."""

    def __init__(self, labelled: bool) -> None:
        self.labels = _LabelTally() if labelled else None
        self.rows = 0
        self.digests = bytearray()
        self.markup = 0

    def add(self, row: Row, file: SplitFile) -> tuple[int, bytes]:
        """The row's label's position and its text's digest."""
        text = text_digest(row.texts)
        self.rows += 1
        self.digests += text
        self.markup += any(_MARKUP.search(part) for part in row.texts)
        if self.labels is None or row.label is None:
            return 0, text
        return self.labels.add(row.label, row.line, file), text

    def scan(self, file: SplitFile, broken: Broken) -> Scan:
        return Scan(
            place=file.source.place,
            layout=file.layout.words,
            found=file.layout.found,
            unit=file.source.unit,
            labels=None if self.labels is None else self.labels.labels(),
            digests=np.frombuffer(self.digests, dtype=np.uint64).reshape(-1, 2),
            broken=broken.count,
            broken_places=broken.places,
            markup=self.markup,
        )


def text_digest(texts: Iterable[str]) -> bytes:
    """16 bytes that name a row's texts, outer white space stripped."""
    joined = "\x1f".join(text.strip() for text in texts)
    return hashlib.blake2b(joined.encode(), digest_size=DIGEST_BYTES).digest()


def read_rows(file: SplitFile, broken: Broken) -> Iterator[Row]:
    """The rows that can be used; the others go to `broken`."""
    records = file.source.records()
    if file.layout.header:
        next(record for record in records if not record.fault)
    for record in records:
        row = record.fault or _row(record, file)
        if isinstance(row, str):
            broken.meet(file.source, record.line, row)
        else:
            yield row


def _row(record: Record, file: SplitFile) -> Row | str:
    """The row, or why the record is none."""
    width = file.layout.width
    if width is not None and len(record.cells) != width:
        others = "the header has" if file.layout.header else "the others have"
        return f"has {len(record.cells)} cells, {others} {width}"
    try:
        texts = tuple(_text(record, column.name, file) for column in file.columns if column.kind == "text")
        labels = (_label(record, column.name, file) for column in file.columns if column.kind == "label")
        return Row(record.line, texts, next(labels, None))
    except KeyError as error:
        return f"has no field {error}"
    except (TypeError, ValueError) as error:
        return str(error)


def _text(record: Record, column: str, file: SplitFile) -> str:
    keys = file.layout.columns[column]
    parts = [_cell_text(record.cells[key], column) for key in keys]
    text = parts[0] if len(parts) == 1 else " ".join(part for part in parts if part.strip())
    if not text.strip():
        raise ValueError(f"the column {column!r} is empty")
    return _encodable(text, column)


def _encodable(text: str, column: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the column {column!r} holds half a character (a lone surrogate)") from None
    return text


def _cell_text(value: object, column: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or isinstance(value, int | float):
        return "" if value is None else str(value)
    raise TypeError(f"the column {column!r} is a {type(value).__name__}, it must be a text")


def _label(record: Record, column: str, file: SplitFile) -> str:
    name = _encodable(label_name(record.cells[file.layout.columns[column][0]]), column)
    if not name:
        raise ValueError(f"the column {column!r} is empty")
    place = f"{file.source.place}, {file.source.unit} {record.line}"
    if file.renamed:
        return _renamed(name, file, place)
    if is_score(name):
        rule = "labels are names or whole numbers; scores are no classes"
        raise DataError(
            f"{place}: the label {name!r} is not a whole number; {rule}. Round them, or name each in data.labels."
        )
    return name


def _renamed(name: str, file: SplitFile, place: str) -> str:
    if name not in file.renamed:
        known = ", ".join(map(repr, file.renamed))
        raise DataError(f"{place}: the label {name!r} is not among those that labels: renames ({known}); add it there.")
    return file.renamed[name]


def _check_class_count(file: SplitFile, classes: int) -> None:
    if classes > MOST_CLASSES:
        raise DataError(_no_label_column(file, f"more than {MOST_CLASSES:,} different labels"))


def _check_rows(file: SplitFile, rows: int, broken: Broken) -> None:
    if rows == 0:
        why = "has a header and no rows" if file.layout.header else "holds no rows"
        skipped = f" ({broken.count} broken lines were skipped, the first: {broken.places[0]})" if broken.count else ""
        wanted = " and ".join(f"a {column.name}" for column in file.columns)
        raise DataError(f"{file.source.place}: {why} that can be used{skipped}; it must hold {wanted} a row.")


def _check_labels(file: SplitFile, classes: int, rows: int) -> None:
    if rows > _FEW_ROWS and 2 * classes > rows:
        raise DataError(_no_label_column(file, f"{classes:,} different labels in {rows:,} rows"))


def _no_label_column(file: SplitFile, found: str) -> str:
    remedy = "the label column looks like text or an id; set data.columns to the right one"
    return f"{file.source.place}: {found} ({file.layout.words}); {remedy}."
