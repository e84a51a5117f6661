"""Files → records, one at a time, each with the line it came from."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol, cast

from moss_rlhf.errors import DataError

Format = Literal["csv", "tsv", "txt", "json", "jsonl", "parquet"]
Documents = Literal["lines", "paragraphs", "file"]
BATCH_ROWS = 2000
_LOOKED_AT = 1000  # lines
_LONGEST_CELL = 2**31 - 1  # csv refuses cells above 131,072 characters unless told otherwise


class Cells(Protocol):
    """A list (csv, tsv, txt: keys are positions from 0) or a mapping (json, jsonl, parquet, hub: keys are names)."""

    def __getitem__(self, key: Any, /) -> Any: ...  # a list and a mapping share no key type
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Any]: ...


class Record(NamedTuple):
    """One row as it stands in the file; `fault` says why it can't be used, '' where it can."""

    line: int
    cells: Cells
    fault: str = ""


class _Line(NamedTuple):
    number: int
    text: str
    fault: str = ""


def read_records(path: Path, format: Format, delimiter: str, encoding: str) -> Generator[Record]:
    """The rows of a file, in order, blank lines left out.

    delimiter   between the cells of csv, tsv and txt; quotes mean something in csv only (RFC 4180).
    returns     records numbered by line (csv, tsv, txt, jsonl) or by row (json, parquet), from 1.
    raises      DataError where the file as a whole can't be read; a fault of one line is in its record.
    """
    with _explained(path):
        if format == "parquet":
            yield from _parquet_records(path)
            return
        with open_bytes(path) as file:
            if format == "json":
                yield from _json_records(file.read(), path, encoding)
                return
            lines = _lines(file, path, encoding)
            yield from _line_records(lines, path, format, delimiter)


def read_documents(path: Path, column: str, documents: Documents, encoding: str) -> Generator[Record]:
    """A plain text as documents, blank ones left out, each with the number of its first line.

    column      the name of the cell that holds the text.
    documents   lines: one each; paragraphs: parted by blank lines, line breaks kept; file: one.
    raises      DataError where the file as a whole can't be read; a fault of one line is in its record.
    """
    waiting: list[_Line] = []
    for line in _plain_lines(path, encoding):
        blank = not line.text.strip() and not line.fault
        if not blank or documents == "file":
            waiting.append(line)
        if waiting and (documents == "lines" or (documents == "paragraphs" and blank)):
            yield _document(waiting, column)
            waiting = []
    if any(line.text.strip() or line.fault for line in waiting):
        yield _document(waiting, column)


def _document(lines: list[_Line], column: str) -> Record:
    text = "".join(line.text for line in lines).strip("\r\n")
    fault = next((line for line in lines if line.fault), lines[0])
    return Record(fault.number, {column: text.replace("\r\n", "\n")}, fault.fault)


def looks_like_paragraphs(path: Path, encoding: str) -> bool:
    """Whether a blank line stands between two others among the first 1,000."""
    texts = "".join(line.text for line in islice(_plain_lines(path, encoding), _LOOKED_AT)).strip()
    return any(not text.strip() for text in texts.split("\n"))


def read_parallel(paths: Mapping[str, Path], encoding: str) -> Generator[Record]:
    """The lines of one number of several files, a cell each, by the names of `paths`; blank lines are cells too.

    raises   DataError where the files have different numbers of lines.
    """
    lines = [_plain_lines(path, encoding) for path in paths.values()]
    for number, parts in enumerate(zip_longest(*lines), 1):
        if None in parts:
            raise DataError(_uneven(paths, encoding))
        cells = {name: line.text.rstrip("\r\n") for name, line in zip(paths, parts, strict=True)}
        faults = (f"of {path}: {line.fault}" for path, line in zip(paths.values(), parts, strict=True) if line.fault)
        yield Record(number, cells, next(faults, ""))


def _uneven(paths: Mapping[str, Path], encoding: str) -> str:
    counts = {path: sum(1 for _ in _plain_lines(path, encoding)) for path in paths.values()}
    found = ", ".join(f"{path} has {count:,} lines" for path, count in counts.items())
    return f"{found}; lines of one number belong together, so both must have as many. Give files of one origin."


def _plain_lines(path: Path, encoding: str) -> Iterator[_Line]:
    with _explained(path), open_bytes(path) as file:
        yield from _lines(file, path, encoding)


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed where its name ends in .gz."""
    packed = path.suffix.lower() == ".gz"
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else path.open("rb")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except gzip.BadGzipFile:
        raise DataError(
            f"{path}: is not a gzip file though its name ends in .gz; rename or compress it again."
        ) from None
    except (EOFError, zlib.error):
        raise DataError(f"{path}: the gzip file is cut off or damaged; copy or download it again.") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it; change its mode or owner.") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error}).") from None


# --- lines ---------------------------------------------------------------------------------------------------------


def _lines(file: IO[bytes], path: Path, encoding: str) -> Iterator[_Line]:
    lines = _wide_lines(file, path, encoding) if _is_wide(encoding) else _narrow_lines(file, path, encoding)
    for line in lines:
        yield line._replace(text=line.text.removeprefix("\ufeff")) if line.number == 1 else line


def _is_wide(encoding: str) -> bool:
    """Whether a line feed takes more than one byte, as in UTF-16: the bytes can't be cut into lines then."""
    return len("\n\n".encode(encoding)) - len("\n".encode(encoding)) > 1


def _narrow_lines(file: IO[bytes], path: Path, encoding: str) -> Iterator[_Line]:
    for number, raw in enumerate(file, 1):
        try:
            yield _Line(number, raw.decode(encoding))
        except UnicodeDecodeError:
            fault = f"its bytes are not {encoding}; {_suggest_encoding(path, raw, encoding)}"
            yield _Line(number, raw.decode(encoding, errors="replace"), fault)


def _wide_lines(file: IO[bytes], path: Path, encoding: str) -> Iterator[_Line]:
    number = 0
    try:
        with io.TextIOWrapper(file, encoding, newline="\n") as lines:
            for number, text in enumerate(lines, 1):
                yield _Line(number, text)
    except UnicodeError:
        hint = _suggest_encoding(path, b"", encoding)
        raise DataError(f"{path}, line {number + 1}: its bytes are not {encoding}; {hint}.") from None


def _suggest_encoding(path: Path, broken: bytes, tried: str) -> str:
    with open_bytes(path) as file:
        start = file.read(4096)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the file starts like UTF-16: set encoding: utf-16"
    sample = broken or start[: start.rfind(b"\n") + 1] or start
    for encoding in ("utf-8", "gb18030"):
        if encoding != tried and _decodes(sample, encoding):
            return f"they can be read as {encoding}: set encoding: {encoding}"
    return "set encoding, such as gb18030, utf-16 or latin-1"


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        return bool(raw.decode(encoding))
    except UnicodeDecodeError:
        return False


# --- lines → records -----------------------------------------------------------------------------------------------


def _line_records(lines: Iterator[_Line], path: Path, format: Format, delimiter: str) -> Iterator[Record]:
    if format == "csv":
        return _csv_records(_CsvLines(lines), path, delimiter)
    return map(_jsonl_record, _filled(lines)) if format == "jsonl" else _cut_records(lines, delimiter)


def _filled(lines: Iterator[_Line]) -> Iterator[_Line]:
    return (line for line in lines if line.fault or line.text.strip())


def _cut_records(lines: Iterator[_Line], delimiter: str) -> Iterator[Record]:
    """For tsv and txt: quotes are literal, so that a stray one in a review swallows nothing."""
    for number, text, fault in lines:
        row = text.removesuffix("\n").removesuffix("\r")
        if row or fault:
            yield Record(number, row.split(delimiter), fault)


def _jsonl_record(line: _Line) -> Record:
    if line.fault:
        return Record(line.number, {}, line.fault)
    try:
        cells = json.loads(line.text)
    except (ValueError, RecursionError) as error:
        return Record(line.number, {}, f"is not JSON ({error})")
    if not isinstance(cells, dict):
        return Record(line.number, {}, f"is a JSON {type(cells).__name__}; each line must be an object")
    return Record(line.number, cells)


class _CsvLines:
    """Feeds lines to csv.reader and remembers, of the record being read, its fault and where its last quote opened."""

    def __init__(self, lines: Iterator[_Line]) -> None:
        self._lines = lines
        self.start_record()

    def start_record(self) -> None:
        self.fault = ""
        self.opened = 0
        self._inside_quotes = False

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.fault = self.fault or line.fault
        if line.text.count('"') % 2:
            self._inside_quotes = not self._inside_quotes
            self.opened = line.number if self._inside_quotes else self.opened
        return line.text


def _csv_records(lines: _CsvLines, path: Path, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        first = reader.line_num + 1
        lines.start_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):  # everything below was swallowed: nothing to skip to
                raise DataError(f"{path}, line {lines.opened or first}: {_OPEN_QUOTE}") from None
            yield Record(first, [], lines.fault or f"is not CSV ({error}); {_QUOTING}")
            continue
        if cells or lines.fault:
            yield Record(first, cells, lines.fault)


_OPEN_QUOTE = 'a quote opens here and is never closed; close it, or write a quote inside a cell twice ("").'
_QUOTING = 'a cell that holds a quote or the delimiter is quoted, and a quote inside it written twice ("")'


# --- whole files ---------------------------------------------------------------------------------------------------


def _json_records(raw: bytes, path: Path, encoding: str) -> Iterator[Record]:
    """A list of objects, or an object with one list of them. Read whole: a file larger than memory is for jsonl."""
    try:
        value = json.loads(raw.decode(encoding).removeprefix("\ufeff")) if raw.strip() else []
    except UnicodeError as error:
        line = raw.count(b"\n", 0, getattr(error, "start", 0)) + 1
        hint = _suggest_encoding(path, raw, encoding)
        raise DataError(f"{path}, line {line}: its bytes are not {encoding}; {hint}.") from None
    except json.JSONDecodeError as error:
        lines = " If every line is an object of its own, set format: jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}, line {error.lineno}: is not JSON ({error.msg}).{lines}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON that can be read ({error}).") from None
    yield from (_json_record(number, item) for number, item in enumerate(_only_list(value, path), 1))


def _only_list(value: object, path: Path) -> list[Any]:
    lists = {"": value} if isinstance(value, list) else {}
    if isinstance(value, dict):
        lists = {name: inner for name, inner in value.items() if isinstance(inner, list)}
    if len(lists) != 1:
        found = f"an object with {len(lists)} lists" if isinstance(value, dict) else f"a {type(value).__name__}"
        rule = 'a list of objects, or an object with one list such as {"data": [...]}'
        raise DataError(f"{path}: holds {found}; it must be {rule}.")
    return next(iter(lists.values()))


def _json_record(number: int, item: object) -> Record:
    if isinstance(item, dict):
        return Record(number, item)
    return Record(number, {}, f"is a JSON {type(item).__name__}; each row must be an object")


def _parquet_records(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with _seekable(path) as file:
            for batch in parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS):
                for row, cells in enumerate(batch.to_pylist(), row + 1):  # noqa: B020  # counts on
                    yield Record(row, cells)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}, after row {row}: is not a whole parquet file ({reason}).") from None


@contextmanager
def _seekable(path: Path) -> Iterator[IO[bytes]]:
    """The file itself, or a temporary decompressed copy: parquet is read from its end."""
    with open_bytes(path) as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            yield copy
