"""DataSpec → clean splits: for training, as Arrow files that are mapped, not held; for `moss check`, as facts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.columns import Column, label_of, text_names
from moss_rlhf.data.planning import FORM, Indices, make_plan
from moss_rlhf.data.reading import BATCH_ROWS
from moss_rlhf.data.scanning import DIGEST_BYTES, Keep, Labels, Row, Scan, SplitFile, open_split, open_splits, scan_rows
from moss_rlhf.errors import DataError
from moss_rlhf.files import digest, new_file, read_json, write_json
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import DataSpec

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import RecordBatch

SAMPLE_ROWS = 1000
_BATCH_CHARACTERS = 2**24
_DIGEST_COLUMN = "text digest"
_LABEL_COLUMN = "label position"
_LINE_COLUMN = "line in the file"


@dataclass(frozen=True)
class Origin:
    """Where a split's rows stand: the file, what its numbers count ("line" or "row"), and each row's, (rows,)."""

    place: str
    unit: str
    lines: NDArray[np.int64]


@dataclass(frozen=True)
class Splits:
    """Clean rows with the task's columns: texts, and the label, where the task has one, as class id (int64).

    test     None where the recipe names none
    labels   names in class-id order; () where the task has none
    facts    {split: {"rows", "dropped": {reason: rows}, "layout", "classes": {name: rows}, "duplicates"}}, without
             classes where the task has no labels; duplicates are rows whose text stood earlier in the same split:
             counted, kept
    notes    sentences for the user
    digest   names the rows: equal digests, equal splits
    origins  {split: where its rows stand}
    """

    train: Dataset
    validation: Dataset
    test: Dataset | None
    labels: tuple[str, ...]
    facts: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    digest: str
    origins: dict[str, Origin] = field(default_factory=dict)

    def line(self, split: str, row: int) -> int:
        """The line in its file of a split's row; its number, from 1, where no origin is known."""
        origin = self.origins.get(split)
        return int(origin.lines[row]) if origin else row + 1


@dataclass(frozen=True)
class DataCheck:
    """What `load_splits` would give, without the rows.

    samples  {split: the text columns of up to 1,000 of its rows, each row as likely as any other}, before anything is
             dropped; validation's are those of train where it is a share of it
    """

    labels: tuple[str, ...]
    facts: dict[str, dict[str, Any]]
    notes: tuple[str, ...]
    samples: dict[str, list[tuple[str, ...]]]


def load_splits(
    spec: DataSpec,
    columns: Sequence[Column],
    *,
    seed: int,
    cache: Path,
    known_labels: Sequence[str] | None = None,
    progress: Progress,
) -> Splits:
    """Read, check and clean the recipe's data.

    columns       the task's standard columns: any number of texts, one label or none.
    seed          of the held-out share and of the limits.
    cache         folder for `<split>-<digest>.arrow`; files of the same content are used again.
    known_labels  names in the order of a trained head, kept where the data has the same names.
    raises        DataError: every message gives the file, the line, the rule and the remedy.
    """
    files = open_splits(spec, columns)
    digests = {split: file.digest() for split, file in files.items()}
    places = {split: cache / f"{split}-{digests[split][:16]}.arrow" for split in files}
    scans = {split: _scan_into(places[split], file, progress) for split, file in files.items()}
    plan = make_plan(scans, spec, seed, known_labels)
    datasets = {
        split: _dataset(places.get(split, places["train"]), label_of(columns), plan.classes[split], rows)
        for split, rows in plan.rows.items()
    }
    share = spec.validation if isinstance(spec.validation, float) else None
    limit = spec.model_dump(mode="json", include={"limit"})
    asked = [share, limit, seed, plan.labels, [dataclasses.astuple(column) for column in columns]]
    name = digest([FORM, digests, *asked])
    train, validation, test = (datasets.get(split) for split in ("train", "validation", "test"))
    origins = {
        split: _origin(scans.get(split, scans["train"]), places.get(split, places["train"]), rows)
        for split, rows in plan.rows.items()
    }
    return Splits(train, validation, test, plan.labels, plan.facts, plan.notes, name, origins)


def check_data(
    spec: DataSpec,
    columns: Sequence[Column],
    *,
    seed: int,
    known_labels: Sequence[str] | None = None,
    progress: Progress,
) -> DataCheck:
    """Read and check everything that `load_splits` does, with the same errors, and write nothing."""
    files = open_splits(spec, columns)
    samples = {split: _Sample(seed) for split in files}
    scans = {split: scan_rows(file, samples[split].keep, progress) for split, file in files.items()}
    plan = make_plan(scans, spec, seed, known_labels)
    texts = {split: samples.get(split, samples["train"]).texts for split in plan.rows}
    return DataCheck(plan.labels, plan.facts, plan.notes, texts)


def load_rows(spec: DataSpec, columns: Sequence[Column], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of `spec.test`, in memory, labels as names; to measure a model on whose labels are `labels`.

    raises  DataError as `load_splits`, and where a label is not among `labels`.
    """
    split = open_split("test", spec, columns)
    kept: list[tuple[Row, int]] = []
    scan = scan_rows(split, lambda row, label, _: kept.append((row, label)), Progress(quiet=True))
    found = scan.labels.names if scan.labels else []
    for name, line in zip(found, scan.labels.lines if scan.labels else (), strict=True):
        if name not in labels:
            place = f"{scan.place}, {scan.unit} {line}: the label {name!r} is none of the model's"
            raise DataError(f"{place} ({', '.join(labels)}). Correct it, or rename it with data.test.labels.")
    texts, column = text_names(columns), label_of(columns)
    rows = [(dict(zip(texts, row.texts, strict=True)), label) for row, label in kept]
    return [row if column is None else row | {column: found[label]} for row, label in rows]


class _Sample:
    """Keeps 1,000 texts of a stream, each row as likely as any other (Vitter 1985, algorithm R)."""

    def __init__(self, seed: int) -> None:
        self.texts: list[tuple[str, ...]] = []
        self._seen = 0
        self._generator = np.random.default_rng(seed)

    def keep(self, row: Row, label: int, digest: bytes) -> None:
        self._seen += 1
        if len(self.texts) < SAMPLE_ROWS:
            self.texts.append(row.texts)
            return
        place = int(self._generator.random() * self._seen)
        if place < SAMPLE_ROWS:
            self.texts[place] = row.texts


# --- Arrow ---------------------------------------------------------------------------------------------------------


def _scan_into(place: Path, file: SplitFile, progress: Progress) -> Scan:
    """The scan of a split, its rows in the Arrow file `place`; both are taken from the cache where they stand there."""
    facts = place.with_suffix(".json")
    if place.exists() and facts.exists():
        return _cached_scan(place, facts, file)
    with new_file(place) as partial, _arrow_writer(partial, file.columns) as keep:
        scan = scan_rows(file, keep, progress)
    labels = None if scan.labels is None else {"names": scan.labels.names, "lines": scan.labels.lines}
    plain = {key: value for key, value in vars(scan).items() if key not in ("digests", "labels")}
    write_json(facts, plain | {"labels": labels})
    return scan


@contextmanager
def _arrow_writer(place: Path, columns: Sequence[Column]) -> Iterator[Keep]:
    """A function that adds a row to a new Arrow file; rows wait in batches, so memory does not grow with the file."""
    import pyarrow

    texts = [(name, pyarrow.string()) for name in text_names(columns)]
    ours = [(_LABEL_COLUMN, pyarrow.int32()), (_DIGEST_COLUMN, pyarrow.binary(DIGEST_BYTES))]
    schema = pyarrow.schema([*texts, *ours, (_LINE_COLUMN, pyarrow.int64())])
    waiting: list[tuple[Any, ...]] = []
    characters = 0

    with place.open("wb") as file, pyarrow.ipc.new_stream(file, schema) as stream:

        def flush() -> None:
            if waiting:
                cells = zip(*waiting, strict=True)
                arrays = [pyarrow.array(values, part.type) for values, part in zip(cells, schema, strict=True)]
                stream.write_batch(pyarrow.record_batch(arrays, schema=schema))
                waiting.clear()

        def keep(row: Row, label: int, digest: bytes) -> None:
            nonlocal characters
            waiting.append((*row.texts, label, digest, row.line))
            characters += sum(map(len, row.texts))
            if len(waiting) == BATCH_ROWS or characters > _BATCH_CHARACTERS:
                flush()
                characters = 0

        yield keep
        flush()


def _cached_scan(place: Path, facts: Path, file: SplitFile) -> Scan:
    import pyarrow

    with pyarrow.memory_map(str(place)) as mapped, pyarrow.ipc.open_stream(mapped) as stream:
        batches = [_batch_arrays(batch) for batch in stream]
    positions, digests = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    values = read_json(facts) | {"place": file.source.place, "digests": digests}
    labels = values.pop("labels")
    return Scan(**values, labels=None if labels is None else Labels(**labels, positions=positions))


def _batch_arrays(batch: RecordBatch) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
    """Copies of a batch's labels, (rows,), and digests, (rows, 2)."""
    digests = batch.column(_DIGEST_COLUMN)
    values = np.frombuffer(digests.buffers()[1], dtype=np.uint64).reshape(-1, 2)
    offset = digests.offset
    return batch.column(_LABEL_COLUMN).to_numpy().copy(), values[offset : offset + batch.num_rows].copy()


def _dataset(place: Path, label: str | None, classes: Indices, rows: Indices) -> Dataset:
    from datasets import Dataset

    whole = Dataset.from_file(str(place)).remove_columns([_LABEL_COLUMN, _DIGEST_COLUMN, _LINE_COLUMN])
    return (whole if label is None else whole.add_column(label, classes)).select(rows)


def _origin(scan: Scan, place: Path, rows: Indices) -> Origin:
    from datasets import Dataset

    lines = np.asarray(Dataset.from_file(str(place)).with_format("numpy")[_LINE_COLUMN][:])
    return Origin(scan.place, scan.unit, lines[rows])
