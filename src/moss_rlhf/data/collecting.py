"""Which texts of a corpus to take: matched, ranked, and diverse. Pure but for reading the corpus, which is a stream."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.scanning import text_digest
from moss_rlhf.data.sources import Source, open_source
from moss_rlhf.errors import DataError, nearest
from moss_rlhf.recipe import SplitLayout

Floats = NDArray[np.floating[Any]]
CorpusRow = tuple[int, str, dict[str, Any]]
"""(line, text, other cells)."""


@dataclass(frozen=True)
class Candidate:
    """A text that might be taken; `line` is its place, in a file or among rows, `fields` the row's other cells."""

    line: int
    text: str
    score: float
    reason: str
    vector: Floats | None = None
    fields: dict[str, Any] = field(default_factory=dict)


class Pool:
    """The best candidates seen so far, at most `size`, no text twice; of equal scores a seeded draw decides."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = np.random.default_rng(seed)
        self._heap: list[tuple[float, float, int, Candidate]] = []
        self._texts: set[bytes] = set()
        self._seen = 0

    def offer(self, candidate: Candidate) -> None:
        name = text_digest([candidate.text])
        if name in self._texts:
            return
        self._seen += 1
        entry = (candidate.score, float(self._generator.random()), self._seen, candidate)
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, entry)
        elif entry > self._heap[0]:
            gone = heapq.heapreplace(self._heap, entry)[-1]
            self._texts.discard(text_digest([gone.text]))
        else:
            return
        self._texts.add(name)

    def best(self) -> list[Candidate]:
        """The candidates, the best first."""
        return [entry[-1] for entry in sorted(self._heap, reverse=True)]


def choose_diverse(scores: Floats, vectors: Floats, count: int, diversity: float) -> list[int]:
    """Positions of `count` candidates, in the order taken, by maximal marginal relevance.

    Each time the one of the largest (1 − d) · relevance − d · (largest cosine to one taken before) goes
    (Carbonell & Goldstein 1998); relevance is the score, scaled to 0 … 1 over the candidates.

    scores, vectors   (candidates,) and (candidates, size), vectors of length 1.
    diversity         d, 0 (the best alone) to 1 (the farthest alone).
    """
    spread = float(scores.max() - scores.min())
    relevance = (scores - scores.min()) / spread if spread else np.ones(len(scores))
    likeness = np.zeros(len(scores))
    left = np.ones(len(scores), dtype=bool)
    taken: list[int] = []
    for _ in range(min(count, len(scores))):
        value = np.where(left, (1 - diversity) * relevance - diversity * likeness, -np.inf)
        place = int(value.argmax())
        taken.append(place)
        left[place] = False
        nearness = vectors @ vectors[place]
        likeness = nearness if len(taken) == 1 else np.maximum(likeness, nearness)
    return taken


class Keywords:
    """Finds words in a text, in any case: whole ones where they are ASCII, anywhere in Chinese or Japanese."""

    def __init__(self, words: Sequence[str]) -> None:
        self._patterns = {word: re.compile(_pattern(word), re.IGNORECASE) for word in words}

    def found(self, text: str) -> list[str]:
        return [word for word, pattern in self._patterns.items() if pattern.search(text)]


def _pattern(word: str) -> str:
    exact = re.escape(word.strip())
    return rf"(?<!\w){exact}(?!\w)" if word.isascii() else exact


def read_corpus(path: str | Path, column: str, field: str = "collect.from") -> Iterator[CorpusRow]:
    """Each row that has a text; broken lines are passed over.

    Of csv and tsv files the first line names the columns; of a txt file every line is a text.

    field    what an error calls the file.
    raises   DataError where the file can't be read or has no such column.
    """
    source = _open(path, field)
    names: list[str] | None = None
    for record in source.records():
        if record.fault:
            continue
        if source.kind == "txt":
            cells: dict[str, Any] = {column: "\t".join(map(str, record.cells))}
        elif source.named:
            cells = dict(record.cells)
        elif names is None:
            names = [str(cell).strip() for cell in record.cells]
            _require(column, names, source.place)
            continue
        else:
            cells = dict(zip(names, record.cells, strict=False))
        if source.named:
            _require(column, list(cells), source.place)
        text = cells.pop(column, None)
        if isinstance(text, str) and text.strip():
            yield record.line, text, cells


def _open(path: str | Path, field: str) -> Source:
    try:
        return open_source("corpus", SplitLayout(file=str(path)), ())
    except DataError as error:
        raise DataError(str(error).replace("data.corpus", field)) from None


def read_examples(path: str | Path, columns: Sequence[str], field: str) -> list[str]:
    """The texts of a file of examples, as `read_corpus` reads it; of a row, what stands in these columns, joined.

    columns  the first must be there.
    raises   DataError as `read_corpus`, and where there is no text.
    """
    first, *others = columns
    rows = read_corpus(path, first, field)
    texts = [" ".join([text, *(str(cells[name]) for name in others if cells.get(name))]) for _, text, cells in rows]
    if not texts:
        raise DataError(f"{field}: {path} holds no example; give at least one text.")
    return texts


def _require(column: str, names: Sequence[str], place: str) -> None:
    if column not in names:
        raise DataError(f"{place}: there is no column {column!r}; {nearest(column, names)} Name the text's column.")
