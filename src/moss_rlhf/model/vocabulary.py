"""Fewer tokens: rewrite the structure of a tokenizer.json so that every kept text encodes as before.

A text is kept if all of its pieces are. Why dropping other pieces can't change its encoding, kind by kind; in each the
new choices are a subset of the old ones that still holds the one taken:

WordPiece (greedy, longest match first; Schuster & Nakajima 2012). At each position the longest piece that matches was
taken. It is kept; what was dropped is either shorter, and was not taken then, or did not match. So the same one is the
longest still, and by induction along the word the same pieces come out. Words that fail are the exception: [UNK] means
that the walk got stuck, and dropping a piece it had passed through may let it pass elsewhere. With {abc, a, ##bcd},
"abcd" takes "abc", finds no "##d" and is [UNK]; without "abc" it is "a ##bcd". So the walks of failing words are kept
too (`failed_walk`).

BPE (Sennrich et al. 2016, arXiv:1508.07909, §3.2). The merge of lowest rank is applied, leftmost first, until none is
left. No merge crosses the border of a final piece, so what happens inside of it is the same as if it stood alone: at
each step the lowest merge of the whole text that lies in the piece is the lowest of the piece. Hence the merges that a
text uses are those that build each of its pieces alone (`derivation`): there are no others to look for. They and the
pieces they pass through are kept; at every step of a kept text the merge taken is there and is the lowest, and at the
end no merge is left, as before. Where `ignore_merges` takes whole words from the table, the same words are in it.

Unigram (Kudo 2018, arXiv:1804.10959, §3.1). The path of highest summed score is taken. Dropping pieces takes paths
away: the path taken keeps its score and still comes first; at a node where scores are equal it won by order, and still
does. It adds one kind of path: a character without a piece of its own is stood in for by the unknown one, whose score
is 10 below the table's lowest. Such a path scores less than the old one with the character's piece in its place, which
lost. This needs the lowest score to stay what it was, so the piece that has it is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import ModelError

Spec = Mapping[str, Any]  # a tokenizer.json
Pair = tuple[str, str]

KINDS = ("WordPiece", "BPE", "Unigram")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Vocabulary:
    """The pieces of one tokenizer.json and what each of them needs. `spec` is not changed."""

    spec: Spec

    @cached_property
    def model(self) -> Mapping[str, Any]:
        model: Mapping[str, Any] = self.spec["model"]
        return model

    @property
    def kind(self) -> str:
        return str(self.model.get("type"))

    @cached_property
    def ids(self) -> dict[str, int]:
        """Piece → id, those of the model and the added tokens."""
        table = self.model["vocab"]
        pieces = dict(table) if isinstance(table, Mapping) else {piece: index for index, (piece, _) in enumerate(table)}
        return pieces | {token["content"]: token["id"] for token in self.spec.get("added_tokens", ())}

    @cached_property
    def pieces(self) -> dict[int, str]:
        """Id → piece."""
        return {index: piece for piece, index in self.ids.items()}

    @cached_property
    def ranks(self) -> dict[Pair, int]:
        """Merge → rank; of a merge that is listed twice, the last counts."""
        return {pair: rank for rank, pair in enumerate(_pairs(self.model["merges"]))}

    @property
    def prefix(self) -> str:
        """What marks a piece that continues a word."""
        return self.model.get("continuing_subword_prefix") or ""

    @property
    def suffix(self) -> str:
        """What marks a piece that ends a word."""
        return self.model.get("end_of_word_suffix") or ""

    @property
    def falls_back_to_bytes(self) -> bool:
        """Whether any text at all encodes without an unknown piece."""
        return bool(self.model.get("byte_fallback")) or self._byte_level

    @property
    def _byte_level(self) -> bool:
        return any("ByteLevel" in _types(self.spec.get(part)) for part in ("normalizer", "pre_tokenizer"))

    @property
    def unknown(self) -> str | None:
        """The piece that stands for what can't be encoded."""
        if self.kind == "Unigram":
            index = self.model.get("unk_id")
            return None if index is None else str(self.model["vocab"][index][0])
        return self.model.get("unk_token")

    def always(self) -> set[str]:
        """Pieces that no text decides on: added tokens, the unknown one, bytes, what is put around a text."""
        needed = {token["content"] for token in self.spec.get("added_tokens", ())}
        needed |= {token for token, _ in _around(self.spec.get("post_processor"))} | {self.unknown or ""}
        if self.model.get("byte_fallback"):
            needed.update(_BYTES)
        if self._byte_level:
            needed |= _byte_alphabet()
        if self.kind == "Unigram":
            needed.add(min(self.model["vocab"], key=lambda entry: entry[1])[0])
        return needed & self.ids.keys()

    def closed(self, pieces: Iterable[str]) -> set[str]:
        """The pieces and all those that texts made of them pass through; the argument of the module's docstring."""
        pieces = set(pieces)
        if self.kind != "BPE":
            return pieces
        merges = {pair for piece in pieces for pair in self.derivation(piece)}
        return pieces | {step for first, second in merges for step in (first, second, self._join(first, second))}

    def derivation(self, piece: str) -> list[Pair]:
        """The merges that build a BPE piece: the lowest rank first, the leftmost of several.

        Empty where merges don't lead to it: a single character, an added token.
        """
        symbols = self.symbols(piece)
        applied: list[Pair] = []
        while len(symbols) > 1:
            ranked = [(self.ranks.get(pair, len(self.ranks)), at) for at, pair in enumerate(pairwise(symbols))]
            rank, at = min(ranked)
            if rank == len(self.ranks):
                return []
            applied.append((symbols[at], symbols[at + 1]))
            symbols[at : at + 2] = [self._join(*applied[-1])]
        return applied

    def symbols(self, piece: str) -> list[str]:
        """The one-character pieces that a piece begins from, with the marks of their places in the word."""
        core = self.core(piece)
        first = self.prefix if self.prefix and piece.startswith(self.prefix) else ""
        marked = [(self.prefix if at else first) + character for at, character in enumerate(core)]
        if marked and self.suffix and piece.endswith(self.suffix):
            marked[-1] += self.suffix
        return marked

    def _join(self, first: str, second: str) -> str:
        return first + second.removeprefix(self.prefix)

    def core(self, piece: str) -> str:
        """The piece without the marks of its place in the word."""
        return piece.removeprefix(self.prefix).removesuffix(self.suffix)

    def characters(self, wanted: Collection[str] | None, continues: Callable[[str], bool]) -> set[str]:
        """All pieces of one character, or those of the characters `wanted`.

        continues   whether a character can continue a word, as the tokenizer splits: pieces that mark a continuation
                    and can never be reached (## and a Chinese character) are left out.
        """
        singles = {piece: core for piece in self.ids if len(core := self.core(piece)) == 1}
        return {
            piece
            for piece, core in singles.items()
            if (wanted is None or core in wanted)
            and (not self.prefix or not piece.startswith(self.prefix) or continues(core))
        }

    def failed_walk(self, word: str) -> list[str]:
        """The pieces that WordPiece passes through in a word until it gets stuck; empty where it doesn't."""
        walked: list[str] = []
        start = 0
        if len(word) > self.model.get("max_input_chars_per_word", 100):
            return []
        while start < len(word):
            mark = self.prefix if start else ""
            ends = (end for end in range(len(word), start, -1) if mark + word[start:end] in self.model["vocab"])
            end = next(ends, None)
            if end is None:
                return walked
            walked.append(mark + word[start:end])
            start = end
        return []

    def filled(self, kept: Collection[str], rows: int, multiple_of: int, order: Iterable[str]) -> set[str]:
        """`kept` with a few pieces more, the first in `order`, so that `rows` plus their number is a multiple.

        More pieces of the old table, not empty rows: those would be rows that a generation head could choose.
        """
        full, room = set(kept), -(rows + len(kept)) % multiple_of
        for piece in order:
            if room == 0:
                break
            if piece not in full and self.closed([piece]) <= full | {piece}:
                full.add(piece)
                room -= 1
        return full


def rewrite(spec: Spec, kept: Collection[int]) -> dict[str, Any]:
    """The tokenizer.json with the ids `kept` only, renumbered 0, 1, … in the old order.

    kept     ids whose pieces are closed (`Vocabulary.closed`) and hold `Vocabulary.always`; ids of no piece only count.
    raises   ModelError where an id that stands around every text is not kept.
    """
    new = {old: index for index, old in enumerate(sorted(kept))}
    added = [token | {"id": new[token["id"]]} for token in spec.get("added_tokens", ()) if token["id"] in new]
    return {
        **spec,
        "added_tokens": added,
        "post_processor": _renumber_around(spec.get("post_processor"), new),
        "padding": _renumber_padding(spec.get("padding"), new),
        "model": _rewrite_model(spec["model"], new),
    }


def _rewrite_model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    table = model["vocab"]
    if model["type"] == "Unigram":
        entries = [entry for index, entry in enumerate(table) if index in new]
        unknown = model.get("unk_id")
        return {**model, "vocab": entries, "unk_id": None if unknown is None else new[unknown]}
    pieces = {piece: new[index] for piece, index in table.items() if index in new}
    if model["type"] == "WordPiece":
        return {**model, "vocab": pieces}
    mark = model.get("continuing_subword_prefix") or ""
    merges = [
        [first, second]
        for first, second in _pairs(model["merges"])
        if first in pieces and second in pieces and first + second.removeprefix(mark) in pieces
    ]
    return {**model, "vocab": pieces, "merges": merges}


def words_probe(spec: Spec) -> dict[str, Any]:
    """A tokenizer.json that normalizes and splits as `spec` does and spells every word in bytes: see `words`."""
    model = {"type": "BPE", "vocab": {byte: index for index, byte in enumerate(_BYTES)}, "merges": []}
    quiet = dict.fromkeys(("post_processor", "padding", "truncation", "decoder"))
    return {**spec, **quiet, "model": model | {"byte_fallback": True}}


def words(tokens: Sequence[str], word_ids: Sequence[int | None]) -> list[str]:
    """The words of a text as the model of the tokenizer is given them, from what `words_probe` made of it."""
    spelled: dict[int | None, bytearray] = {}
    for token, word in zip(tokens, word_ids, strict=True):
        if _BYTE.fullmatch(token):
            spelled.setdefault(word, bytearray()).append(int(token[3:5], 16))
    return [word.decode("utf-8", errors="replace") for word in spelled.values()]


def ids_in(smaller: Mapping[str, int], larger: Mapping[str, int]) -> NDArray[np.int64]:
    """The larger vocabulary's id of every token of the smaller one, (tokens of the smaller,), −1 at ids without token.

    A model with a trimmed vocabulary asks one with the whole by `larger_ids = ids_in(…)[smaller_ids]`, and of the
    larger one's logits over tokens takes the columns `ids_in(…)`.
    raises   ModelError where the larger one lacks a token.
    """
    missing = smaller.keys() - larger.keys()
    if missing:
        raise ModelError(
            f"the vocabulary has {len(missing)} tokens, such as {min(missing)!r}, that the other one lacks; one must "
            "be cut from the other. Give models of one origin."
        )
    table = np.full(max(smaller.values(), default=-1) + 1, -1, dtype=np.int64)
    for token, index in smaller.items():
        table[index] = larger[token]
    return table


def _pairs(merges: Iterable[Any]) -> list[Pair]:
    """Merges, which older files write as "first second"."""
    split = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    return [(first, second) for first, second in split]


def _types(node: Any) -> set[str]:
    """The types of a normalizer or pre-tokenizer and of those inside."""
    if isinstance(node, Mapping):
        return {str(node.get("type"))}.union(*(_types(value) for value in node.values()))
    return set().union(*(_types(value) for value in node)) if isinstance(node, list) else set()


def _byte_alphabet() -> set[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _around(processor: Any) -> list[tuple[str, int]]:
    """The tokens, with ids, that a post-processor puts around a text."""
    if processor is None:
        return []
    match processor["type"]:
        case "Sequence":
            return [token for inner in processor["processors"] for token in _around(inner)]
        case "TemplateProcessing":
            specials = processor["special_tokens"].values()
            return [pair for each in specials for pair in zip(each["tokens"], each["ids"], strict=True)]
        case "BertProcessing" | "RobertaProcessing":
            return [(token, index) for token, index in (processor["sep"], processor["cls"])]
    return []


def _renumber_around(processor: Any, new: Mapping[int, int]) -> Any:
    gone = [token for token, index in _around(processor) if index not in new]
    if gone:
        raise ModelError(f"tokenizer.json: {gone[0]} is put around every text and can't be dropped.")
    if processor is None:
        return None
    match processor["type"]:
        case "Sequence":
            return processor | {"processors": [_renumber_around(inner, new) for inner in processor["processors"]]}
        case "TemplateProcessing":
            specials = processor["special_tokens"].items()
            return processor | {
                "special_tokens": {name: each | {"ids": [new[old] for old in each["ids"]]} for name, each in specials}
            }
        case "BertProcessing" | "RobertaProcessing":
            return processor | {end: [processor[end][0], new[processor[end][1]]] for end in ("sep", "cls")}
    return processor


def _renumber_padding(padding: Any, new: Mapping[int, int]) -> Any:
    return None if padding is None else padding | {"pad_id": new.get(padding["pad_id"], 0)}
