"""Near duplicates: MinHash finds the candidates, the shingles themselves decide.

A text is the set of its character n-grams; two texts are alike as far as their sets are, by Jaccard similarity
J = |A ∩ B| / |A ∪ B|. A MinHash signature holds the least value of each of 128 hash functions over the set: two agree
in a place with probability J (Broder 1997). Signatures are cut into bands, and texts that agree in a whole band are
candidates (Indyk & Motwani 1998; Leskovec, Rajaraman & Ullman, Mining of Massive Datasets, §3.4). A candidate counts
only where J itself reaches the threshold, so chance makes no false find; what it may miss is bounded by `_FOUND`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.cleaning.finding import Hit

Hashes = NDArray[np.uint64]
Signature = NDArray[np.uint32]
Name = tuple[str, int]

_PERMUTATIONS = 128
_FOUND = 0.995  # least probability that a pair at the threshold is a candidate
_LETTERS, _IDEOGRAPHS = 5, 2  # characters of a shingle
_BASE = np.uint64(0x9E3779B97F4A7C15)
_CHUNK_HASHES = 2**14
_DEVIATIONS = 4  # of a signature's estimate below the threshold, from which a pair is not looked at


def even_out(text: str) -> str:
    """A text as it is compared: compatibility forms, case and white space evened out."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def shingles(text: str) -> Hashes:
    """Hashes of a text's character 5-grams, sorted, each once; 2-grams where most letters are ideographs.

    A text that is shorter is its own only shingle.
    """
    even = even_out(text)
    codes = np.frombuffer(even.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    ideographs = int(((codes >= 0x3040) & (codes <= 0x9FFF)).sum() + ((codes >= 0xAC00) & (codes <= 0xD7A3)).sum())
    size = min(len(codes), _IDEOGRAPHS if 2 * ideographs > len(codes) else _LETTERS)
    hashes = np.zeros(len(codes) - size + 1 if size else 1, dtype=np.uint64)
    for offset in range(size):  # a polynomial in an odd base, modulo 2^64
        hashes = hashes * _BASE + codes[offset : offset + len(hashes)] + np.uint64(1)
    return np.unique(_mixed(hashes))


def _mixed(hashes: Hashes) -> Hashes:
    """The finalizer of splitmix64 (Steele et al. 2014): every bit of the input moves every bit of the output."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashes = (hashes ^ (hashes >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hashes ^ (hashes >> np.uint64(31))


class MinHash:
    """128 hash functions h → (a · h + b) mod 2^64, high half, a odd; drawn once by a seed."""

    def __init__(self, seed: int = 0) -> None:
        factors, shifts = np.random.default_rng(seed).integers(2**64, size=(2, _PERMUTATIONS), dtype=np.uint64)
        self._factors, self._shifts = (factors | np.uint64(1))[:, None], shifts[:, None]

    def signature(self, hashes: Hashes) -> Signature:
        """The least value of each function over a set of hashes: (hashes,) → (128,)."""
        least = np.full(_PERMUTATIONS, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(hashes), _CHUNK_HASHES):
            values = hashes[start : start + _CHUNK_HASHES] * self._factors + self._shifts
            np.minimum(least, values.min(axis=1), out=least)
        return (least >> np.uint64(32)).astype(np.uint32)


def band_rows(threshold: float) -> int:
    """Rows of a band: as many as leave a pair at the threshold a candidate with probability 0.995 or more.

    1 − (1 − tʳ)^(128 / r) is that probability; more rows mean fewer candidates to look at.
    """
    fitting = [rows for rows in range(1, 33) if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _FOUND]
    return max(fitting, default=1)


def jaccard(one: Hashes, other: Hashes) -> float:
    """|A ∩ B| / |A ∪ B| of two sorted sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


class SimilarTexts:
    """Texts added one by one; `nearest` finds the most similar of them. Texts equal when evened out are kept once."""

    def __init__(self, threshold: float) -> None:
        self._threshold, self._rows = threshold, band_rows(threshold)
        self._least = threshold - _DEVIATIONS * (threshold * (1 - threshold) / _PERMUTATIONS) ** 0.5
        self._minhash = MinHash()
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        self._texts: list[str] = []
        self._names: list[Name] = []
        self._signatures: list[Signature] = []
        self._known: set[str] = set()

    def add(self, text: str, name: Name) -> None:
        even = even_out(text)
        if even not in self._known:
            self._known.add(even)
            mark = self._minhash.signature(shingles(text))
            for key in self._keys(mark):
                self._bands.setdefault(key, []).append(len(self._texts))
            self._texts.append(text)
            self._names.append(name)
            self._signatures.append(mark)

    def nearest(self, text: str) -> tuple[float, Name] | None:
        """(similarity, name) of the most similar text at or above the threshold; of equals the one added first."""
        hashes = shingles(text)
        mark = self._minhash.signature(hashes)
        candidates = {place for key in self._keys(mark) for place in self._bands.get(key, ())}
        likely = [place for place in candidates if (self._signatures[place] == mark).mean() >= self._least]
        found = [(jaccard(hashes, shingles(self._texts[place])), -place) for place in likely]
        similarity, place = max(found, default=(0.0, 0))
        return (similarity, self._names[-place]) if found and similarity >= self._threshold else None

    def _keys(self, mark: Signature) -> list[tuple[int, bytes]]:
        whole = _PERMUTATIONS // self._rows * self._rows
        return [(start, mark[start : start + self._rows].tobytes()) for start in range(0, whole, self._rows)]


def near_duplicates(split: str, texts: Sequence[str], labels: Sequence[str] | None, threshold: float) -> list[Hit]:
    """Rows like an earlier one that is no near duplicate itself. Certain where the labels agree.

    Where they differ, one word may have turned the meaning: such a row is listed, not dropped, and later ones are
    compared with it as well.
    """
    known, hits = SimilarTexts(threshold), []
    for row, text in enumerate(texts):
        found = known.nearest(text)
        alike = found is not None and (labels is None or labels[found[1][1]] == labels[row])
        if found is not None:
            hits.append(Hit(row, _likeness(found[0], alike), found[1], certain=alike))
        if not alike:
            known.add(text, (split, row))
    return hits


def _likeness(similarity: float, same_label: bool) -> str:
    return f"{similarity:.0%} alike" + ("" if same_label else ", another label")


def leaking_rows(texts: Sequence[str], references: Mapping[str, Sequence[str]], threshold: float) -> list[Hit]:
    """Rows like one of another split.

    references   {split: its texts}.
    """
    known = SimilarTexts(threshold)
    for split, others in references.items():
        for row, text in enumerate(others):
            known.add(text, (split, row))
    found = ((row, known.nearest(text)) for row, text in enumerate(texts))
    return [Hit(row, _likeness(match[0], same_label=True), match[1]) for row, match in found if match is not None]
