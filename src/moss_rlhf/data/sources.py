"""Where a split's rows come from: a file, or a data set that the `datasets` library loads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

from moss_rlhf.data.columns import Column, text_names
from moss_rlhf.data.reading import (
    BATCH_ROWS,
    Documents,
    Format,
    Record,
    looks_like_paragraphs,
    read_documents,
    read_parallel,
    read_records,
)
from moss_rlhf.errors import DataError
from moss_rlhf.files import digest, file_digest
from moss_rlhf.recipe import SplitLayout

_DELIMITERS: dict[Format, str] = {"csv": ",", "tsv": "\t", "txt": "\t"}
_FORMATS: tuple[Format, ...] = get_args(Format)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class DocumentRule:
    """How a plain text is parted into documents. `found`: by looking at it, the recipe does not say."""

    name: Documents
    found: bool

    @property
    def words(self) -> str:
        return {
            "lines": "a document a line",
            "paragraphs": "a document a paragraph, parted by blank lines",
            "file": "one document",
        }[self.name]


class Source(Protocol):
    """Rows that can be read again and again. `named`: cells have names; `unit`: what a record's number counts.

    documents   of a plain text, which has no cells; else None
    """

    @property
    def place(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def named(self) -> bool: ...
    @property
    def unit(self) -> str: ...
    @property
    def documents(self) -> DocumentRule | None: ...
    def records(self) -> Generator[Record]: ...
    def digest(self) -> str:
        """Names the content and how it is decoded."""
        ...


@dataclass(frozen=True)
class FileSource:
    path: Path
    kind: Format
    delimiter: str
    encoding: str
    documents: None = None

    @property
    def place(self) -> str:
        return str(self.path)

    @property
    def named(self) -> bool:
        return self.kind not in _DELIMITERS

    @property
    def unit(self) -> str:
        return "row" if self.kind in ("json", "parquet") else "line"

    def records(self) -> Generator[Record]:
        return read_records(self.path, self.kind, self.delimiter, self.encoding)

    def digest(self) -> str:
        return digest([self.kind, self.delimiter, self.encoding, file_digest(self.path)])


@dataclass(frozen=True)
class PlainSource:
    """A text file without cells: documents, which are the cells of the column `column`."""

    path: Path
    column: str
    documents: DocumentRule
    encoding: str
    kind: str = "txt"
    named: bool = True
    unit: str = "line"

    @property
    def place(self) -> str:
        return str(self.path)

    def records(self) -> Generator[Record]:
        return read_documents(self.path, self.column, self.documents.name, self.encoding)

    def digest(self) -> str:
        return digest(["plain", self.documents.name, self.encoding, file_digest(self.path)])


@dataclass(frozen=True)
class ParallelSource:
    """A text file a column, whose lines of one number belong together."""

    paths: Mapping[str, Path]
    encoding: str
    kind: str = "parallel files"
    named: bool = True
    unit: str = "line"
    documents: None = None

    @property
    def place(self) -> str:
        return " + ".join(map(str, self.paths.values()))

    def records(self) -> Generator[Record]:
        return read_parallel(self.paths, self.encoding)

    def digest(self) -> str:
        return digest(["parallel", self.encoding, {name: file_digest(path) for name, path in self.paths.items()}])


@dataclass(frozen=True)
class HubSource:
    """A split that `datasets` loaded; class ids are given their names back."""

    place: str
    dataset: Any
    kind: str = "data set"
    named: bool = True
    unit: str = "row"
    documents: None = None

    def records(self) -> Generator[Record]:
        row = 0
        for batch in self.dataset.iter(BATCH_ROWS):
            columns = [self._named_classes(name, values) for name, values in batch.items()]
            for row, cells in enumerate(zip(*columns, strict=True), row + 1):  # noqa: B020  # counts on
                yield Record(row, dict(zip(batch, cells, strict=True)))

    def _named_classes(self, column: str, values: list[Any]) -> list[Any]:
        names = getattr(self.dataset.features[column], "names", None)  # only ClassLabel has them
        if names is None:
            return values
        return [names[value] if value is not None and value >= 0 else None for value in values]  # -1: not labelled

    def digest(self) -> str:
        return str(self.dataset._fingerprint)


def open_source(split: str, layout: SplitLayout, columns: Sequence[Column], cut: bool = False) -> Source:
    """The rows that a split's layout names.

    columns  the task's: where they are one text alone, a txt file is plain text and has no cells
    cut      the recipe says which cells are the columns, so that there are cells
    raises   DataError where there are none to read, or an option of the layout means nothing for them.
    """
    field = f"data.{split}"
    if layout.files:
        return _open_parallel(field, layout, [column.name for column in columns])
    if layout.hub is None:
        path = Path(str(layout.file))
        plain = len(columns) == 1 and not cut and layout.delimiter is None and layout.header is None
        if plain and (layout.format or _format_of(path)) == "txt":
            return _open_plain(field, path, layout, text_names(columns)[0])
        return _open_file(field, path, layout)
    options = ("format", "header", "delimiter", "encoding", "documents")
    _refuse_options(field, layout, options, "a data set on the hub or in a folder")
    return _load_hub(field, layout.hub, layout.split or split)


def _open_plain(field: str, path: Path, layout: SplitLayout, column: str) -> PlainSource:
    _check_file(field, path)
    _refuse_options(field, layout, ("split",), "a file")
    _check_encoding(field, layout.encoding)
    found: Documents = "paragraphs" if looks_like_paragraphs(path, layout.encoding) else "lines"
    rule = DocumentRule(layout.documents or found, layout.documents is None)
    return PlainSource(path, column, rule, layout.encoding)


def _open_parallel(field: str, layout: SplitLayout, columns: Sequence[str]) -> ParallelSource:
    options = ("split", "format", "header", "delimiter", "columns", "documents")
    _refuse_options(field, layout, options, "files that are read line by line")
    _check_encoding(field, layout.encoding)
    if sorted(layout.files) != sorted(columns):
        raise DataError(
            f"{field}.files: gives {', '.join(layout.files)}; it must give one file for each of {', '.join(columns)}."
        )
    paths = {name: Path(layout.files[name]) for name in columns}
    for name, path in paths.items():
        _check_file(f"{field}.files.{name}", path)
        if _format_of(path) not in (None, "txt"):
            rule = "files are read as plain text, line by line; give a text file, or the one file with all columns"
            raise DataError(f"{field}.files.{name}: {path} is {_format_of(path)}, and {rule}.")
    return ParallelSource(paths, layout.encoding)


def _open_file(field: str, path: Path, layout: SplitLayout) -> FileSource:
    format = layout.format or _format_of(path)
    _check_file(field, path)
    if format is None:
        raise DataError(f"{field}: {path} has no known ending ({', '.join(_FORMATS)}, also .gz); set {field}.format.")
    _refuse_options(field, layout, ("split",), "a file")
    _refuse_options(field, layout, ("documents",), "a file with cells: it is for a txt file of texts alone")
    if format not in _DELIMITERS:
        _refuse_options(field, layout, ("header", "delimiter"), f"{format}, which names its columns")
    if format == "parquet":
        _refuse_options(field, layout, ("encoding",), "parquet")
    _check_encoding(field, layout.encoding)
    return FileSource(path, format, layout.delimiter or _DELIMITERS.get(format, ""), layout.encoding)


def split_layout(split: str, value: str | SplitLayout) -> SplitLayout:
    """The layout behind the short form: a file, a folder, else a data set id on the hub."""
    if isinstance(value, SplitLayout):
        return value
    path = Path(value)
    try:
        is_folder, is_file = path.is_dir(), path.exists() or _format_of(path) is not None
    except OSError as error:
        raise DataError(f"data.{split}: {value!r} can't be looked at ({error.strerror}).") from None
    if is_folder:
        return SplitLayout(hub=value)
    if is_file:
        return SplitLayout(file=value)
    if not _HUB_ID.fullmatch(value):
        raise DataError(f"data.{split}: {value!r} is no file, no folder, and no data set id such as owner/name.")
    return SplitLayout(hub=value)


def _format_of(path: Path) -> Format | None:
    name = path.name.lower().removesuffix(".gz")
    return next((format for format in _FORMATS if name.endswith(f".{format}")), None)


def _check_file(field: str, path: Path) -> None:
    try:
        if path.is_file():
            return
        if path.is_dir():
            raise DataError(
                f"{field}: {path} is a folder, not a file; give one file, or {field}.hub for a folder of them."
            )
        if path.exists():
            raise DataError(f"{field}: {path} is not a regular file (a device, a pipe or a socket); copy it into one.")
        raise DataError(f"{field}: there is no file {path}.{_neighbour(path)}")
    except OSError as error:
        raise DataError(f"{field}: {path} can't be looked at ({error.strerror}).") from None


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {path.parent} either; paths are relative to the working directory."
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _check_encoding(field: str, encoding: str) -> None:
    try:
        "\n".encode(encoding)
    except LookupError:
        raise DataError(
            f"{field}.encoding: {encoding!r} is not known; give one such as utf-8, gb18030, utf-16."
        ) from None


def _refuse_options(field: str, layout: SplitLayout, options: tuple[str, ...], what: str) -> None:
    """No option is ignored: what has no meaning for this source is an error."""
    for name in options:
        value = getattr(layout, name)
        if value not in (SplitLayout.model_fields[name].default, {}):
            raise DataError(f"{field}.{name}: {value!r} has no meaning for {what}; leave it out.")


def _load_hub(field: str, name: str, split: str) -> HubSource:
    import datasets

    datasets.disable_progress_bars()
    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises OSError, ValueError and a dozen of its own: all mean the same here
        reason = " ".join(str(error).split())[:300].rstrip(".")
        rule = "give a file, a folder that holds data files, or an id that can be reached (HF_HUB_OFFLINE forbids it)"
        raise DataError(f"{field}: the split {split!r} of {name!r} can't be loaded ({reason}); {rule}.") from None
    return HubSource(f"{name} ({split})", dataset)
