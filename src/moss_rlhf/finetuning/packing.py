"""Texts → rows of tokens for a language model: joined and cut to one length, or each text by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import ModelError

_TOKENIZED_AT_ONCE = 1000


@dataclass(frozen=True)
class Frame:
    """What the tokenizer puts around a text, and what parts two texts that share a row."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    separator: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.before) + len(self.after)


def frame_of(tokenizer: Any) -> Frame:
    """Read off what it adds to a text. The separator is what ends one, else the end-of-text token, if any."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((start for start in range(len(whole)) if whole[start : start + len(bare)] == bare), 0)
    before, after = tuple(whole[:at]), tuple(whole[at + len(bare) :])
    end = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return Frame(before, after, after or end)


@dataclass(frozen=True)
class Packed:
    """Rows as slices of one flat array.

    ids        (tokens,) of all rows, without what frames a row.
    starts     (tokens,) True where a word begins.
    special    (tokens,) True on separators.
    edges      (rows + 1,) where each row begins, and the last ends.
    """

    ids: NDArray[np.int32]
    starts: NDArray[np.bool_]
    special: NDArray[np.bool_]
    edges: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, row: int) -> dict[str, Any]:
        inside = slice(self.edges[row], self.edges[row + 1])
        return {
            "row": row,
            "ids": self.ids[inside].astype(np.int64),
            "starts": self.starts[inside],
            "special": self.special[inside],
        }

    @property
    def lengths(self) -> list[int]:
        return [int(length) for length in np.diff(self.edges)]


def pack(
    texts: Sequence[str], tokenizer: Any, length: int, packed: bool, whole_words: bool, shortest: int = 1
) -> Packed:
    """Tokenize texts and cut them into rows of at most `length` tokens, the frame not counted.

    packed     texts follow one another, a separator after each, and rows are cut from the whole wherever they fill;
               what stands in one row can be attended to across the separators (RoBERTa's FULL-SENTENCES: Liu et al.
               2019, arXiv:1907.11692, §4.2). Else every text begins a row, and goes on in the next where it is longer.
    shortest   rows of fewer tokens are left out: of a single one, a causal model has nothing to foretell.
    raises     ModelError where whole words are asked for and the tokenizer can't tell them.
    """
    separator = frame_of(tokenizer).separator if packed else ()
    ids, starts, special, ends = _tokenized(texts, tokenizer, separator, whole_words)
    if packed:
        edges = np.append(np.arange(0, len(ids), length), len(ids))
    else:
        begins = [cut for start, end in pairwise([0, *ends]) for cut in range(start, end, length)]
        edges = np.append(np.array(begins, dtype=np.int64), len(ids))
    return _without_short(Packed(ids, starts, special, edges), shortest)


def _without_short(rows: Packed, shortest: int) -> Packed:
    lengths = np.array(rows.lengths, dtype=np.int64)
    if (lengths >= shortest).all():
        return rows
    kept = np.repeat(lengths >= shortest, lengths)
    edges = np.cumsum(np.append(0, lengths[lengths >= shortest]))
    return Packed(rows.ids[kept], rows.starts[kept], rows.special[kept], edges)


def _tokenized(
    texts: Sequence[str], tokenizer: Any, separator: Sequence[int], whole_words: bool
) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.bool_], list[int]]:
    """Flat ids, word starts, separators, and where every text ends."""
    if whole_words and not tokenizer.is_fast:
        raise ModelError("pretrain.whole_words: the model's tokenizer can't tell where words begin. Set it to false.")
    ids: list[NDArray[np.int32]] = []
    starts: list[NDArray[np.bool_]] = []
    special: list[NDArray[np.bool_]] = []
    apart, ones = np.array(separator, dtype=np.int32), np.ones(len(separator), dtype=np.bool_)
    for first in range(0, len(texts), _TOKENIZED_AT_ONCE):
        part = list(texts[first : first + _TOKENIZED_AT_ONCE])
        encoded = tokenizer(part, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for index, tokens in enumerate(encoded["input_ids"]):
            words = encoded.word_ids(index) if whole_words else list(range(len(tokens)))
            ids.append(np.concatenate([np.array(tokens, dtype=np.int32), apart]))
            starts.append(np.concatenate([_begins(words), ones]))
            special.append(np.concatenate([np.zeros(len(tokens), dtype=np.bool_), ones]))
    ends = np.cumsum([len(part) for part in ids])
    return np.concatenate(ids), np.concatenate(starts), np.concatenate(special), [int(end) for end in ends]


def _begins(words: Sequence[int | None]) -> NDArray[np.bool_]:
    """True where a token is of another word than the one before it."""
    return np.array([index == 0 or word is None or word != words[index - 1] for index, word in enumerate(words)], bool)
