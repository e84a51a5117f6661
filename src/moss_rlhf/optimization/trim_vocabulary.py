"""Trim the vocabulary: keep the tokens that the user's texts need, and rewrite the tokenizer to match.

Every text whose pieces are all kept encodes to the same pieces as before, under new ids (`model.vocabulary` says why),
and the network gives the same answers for it: rows of the table that no text asks for are all that goes.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.tables import has_token_head, keep_tokens, tokens_in_configs
from moss_rlhf.model.vocabulary import KINDS, Vocabulary, rewrite, words, words_probe
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import TrimVocabularySpec
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks import TASKS

_AT_ONCE = 1000  # texts
_NO_ID = -1


@takes_model
@follows(TrimVocabularySpec, "trim_vocabulary")
def trim_vocabulary(
    model: Model,
    corpora: Any,
    *,
    minimum_count: int = 1,
    keep: Sequence[str] = (),
    characters: Literal["all", "seen"] = "all",
    multiple_of: int = 8,
    held_out: Any = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Keep the tokens that `corpora` need, in place, network and tokenizer; returns the facts.

    corpora         texts, or rows with the task's text columns (mappings or a datasets.Dataset), not yet tokenized.
    minimum_count   tokens seen fewer times go; texts with them are spelled in smaller pieces from then on.
    keep            words or texts that must encode as before, whatever their counts.
    characters      of the one-character pieces keep "all" that texts can reach, so that nothing becomes unknown that
                    was not; or those "seen" in the corpora (and `keep`): smaller, and an unseen letter is [UNK].
    multiple_of     the table's size is rounded up to it with more of the old tokens: runtimes like multiples of 8.
    held_out        as `corpora`; only counted: the facts say what changes for texts like these.
    raises          ModelError on a quantized model or a tokenizer of another kind; DataError where there is no text.
                    The model is untouched then.
    """
    _refuse(model)
    progress, texts = progress or Progress(quiet=True), _texts(model, corpora)
    backend, vocabulary = _backend(model.tokenizer)
    counts, failing = _count(backend, vocabulary, progress.track(texts, "counting tokens"))
    asked, _ = _count(backend, vocabulary, _with_space(keep))
    if not counts.sum():
        raise DataError("trim_vocabulary: the texts hold no token. Give the texts that the model is to be used on.")
    pieces = _needed(backend, vocabulary, counts, asked, minimum_count=minimum_count, characters=characters)
    kept = _kept_ids(model, vocabulary, pieces | failing, multiple_of, counts)
    tokenizer = _rebuilt(model.tokenizer, vocabulary, kept)
    compare = partial(_compare, vocabulary, backend, _backend(tokenizer)[0], kept)
    changes = {"corpora": compare(progress.track(texts, "comparing"))}
    if held_out is not None:
        changes["held_out"] = compare(_texts(model, held_out))
    return _facts(model, vocabulary, counts, kept) | changes | _apply(model, tokenizer, kept)


def _refuse(model: Model) -> None:
    if model.quantization:
        raise ModelError("trim_vocabulary: the model is quantized already; trim it before, then quantize.")
    refuse_not_finite(model, "trim_vocabulary")
    kind = type(model.tokenizer).__name__
    if not model.tokenizer.is_fast:
        raise ModelError(
            f"trim_vocabulary: {kind} has no tokenizer.json (Marian's, for one, is SentencePiece read by Python). Fast "
            f"tokenizers of the kinds {', '.join(KINDS)} can be trimmed; leave this stage out for the others."
        )


def _backend(tokenizer: Any) -> tuple[Any, Vocabulary]:
    """The tokenizer's engine, a copy that neither pads nor truncates, and its vocabulary; ModelError on other kinds."""
    from tokenizers import Tokenizer

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = Vocabulary(spec)
    if vocabulary.kind not in KINDS:
        raise ModelError(
            f"trim_vocabulary: the tokenizer is of the kind {vocabulary.kind}; {', '.join(KINDS)} can be trimmed. "
            "Leave this stage out."
        )
    if vocabulary.model.get("dropout"):
        raise ModelError(
            "trim_vocabulary: the tokenizer drops merges at random (model.dropout in tokenizer.json), so no text has "
            "pieces of its own. Set it to null."
        )
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.no_padding()
    backend.no_truncation()
    return backend, vocabulary


# --- texts ---------------------------------------------------------------------------------------------------------


class _Texts:
    """Texts of rows, in chunks, as often as asked for."""

    def __init__(self, rows: Any, columns: Sequence[str]) -> None:
        self.rows, self.columns = rows, columns

    def __iter__(self) -> Iterator[list[str]]:
        for start in range(0, len(self.rows), _AT_ONCE):
            yield self._chunk(self.rows[start : start + _AT_ONCE])

    def _chunk(self, rows: Any) -> list[str]:
        if isinstance(rows, Mapping):  # of a datasets.Dataset
            return [text for column in self.columns for text in rows[column]]
        if not self.columns:
            return list(rows)
        return [row[column] for row in rows for column in self.columns if column in row]


def _texts(model: Model, rows: Any) -> _Texts:
    if isinstance(rows, str) or not len(rows):
        raise DataError(f"trim_vocabulary: expected a list of texts or rows, got {rows!r}. Give the training rows.")
    if isinstance(rows, Sequence) and isinstance(rows[0], str):
        return _Texts(rows, ())
    names = rows[0].keys()
    columns = [column.name for column in TASKS[model.task].columns if column.kind == "text" and column.name in names]
    if not columns:
        asked = ", ".join(column.name for column in TASKS[model.task].columns if column.kind == "text")
        raise DataError(
            f"trim_vocabulary: the rows have the columns {', '.join(names)} and {model.task} keeps its texts in "
            f"{asked}. Give rows as they are before they are tokenized."
        )
    return _Texts(rows, columns)


def _with_space(keep: Sequence[str]) -> list[list[str]]:
    """The texts, and each as it is within a sentence, where byte-level pieces begin with the space."""
    return [[form for text in keep for form in (text, f" {text}")]] if keep else []


def _encode(backend: Any, texts: list[str], framed: bool = True) -> list[NDArray[np.int64]]:
    """Ids of each text; `framed` by the tokens that the tokenizer puts around it."""
    encoded = backend.encode_batch_fast(texts, add_special_tokens=framed)
    return [np.array(each.ids, dtype=np.int64) for each in encoded]


def _count(backend: Any, vocabulary: Vocabulary, texts: Iterable[list[str]]) -> tuple[NDArray[np.int64], set[str]]:
    """How often each id is used, (ids,), and the pieces that words of unknown encoding pass through (WordPiece)."""
    from tokenizers import Tokenizer

    counts = np.zeros(max(vocabulary.pieces) + 1, dtype=np.int64)
    unknown = vocabulary.ids.get(vocabulary.unknown or "", _NO_ID)
    probe = Tokenizer.from_str(json.dumps(words_probe(vocabulary.spec)))
    walked: set[str] = set()
    for chunk in texts:
        encoded = _encode(backend, chunk, framed=False)
        counts += np.bincount(np.concatenate([*encoded, np.zeros(0, dtype=np.int64)]), minlength=len(counts))
        if vocabulary.kind == "WordPiece":
            lost = [text for text, ids in zip(chunk, encoded, strict=True) if unknown in ids]
            for each in probe.encode_batch(lost, add_special_tokens=False):
                for word in words(each.tokens, each.word_ids):
                    walked.update(vocabulary.failed_walk(word))
    return counts, walked


# --- what stays ----------------------------------------------------------------------------------------------------


def _needed(
    backend: Any,
    vocabulary: Vocabulary,
    counts: NDArray[np.int64],
    asked: NDArray[np.int64],
    *,
    minimum_count: int,
    characters: Literal["all", "seen"],
) -> set[str]:
    seen = {vocabulary.pieces[int(index)] for index in np.flatnonzero(counts + asked)}
    used = {vocabulary.pieces[int(index)] for index in np.flatnonzero((counts >= minimum_count) | (asked > 0))}
    # with bytes to fall back on nothing becomes unknown
    everything = characters == "all" and not vocabulary.falls_back_to_bytes
    wanted = None if everything else {character for piece in seen for character in vocabulary.core(piece)}
    return used | vocabulary.characters(wanted, _continuation(backend)) | vocabulary.always()


def _continuation(backend: Any) -> Callable[[str], bool]:
    """Whether a character stays in one word with the letter before it: a Chinese one or a comma does not in BERT."""

    def continues(character: str) -> bool:
        text = f"a{character}"
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        split = [(text, None)] if backend.pre_tokenizer is None else backend.pre_tokenizer.pre_tokenize_str(text)
        return any(word.endswith(f"a{character}") for word, _ in split)

    return continues


def _kept_ids(
    model: Model, vocabulary: Vocabulary, pieces: set[str], multiple_of: int, counts: NDArray[np.int64]
) -> list[int]:
    """Old ids, ascending; the new id of each is its position."""
    named = tokens_in_configs(model.network) | {index for index in model.tokenizer.all_special_ids if index is not None}
    bare = {index for index in named if index not in vocabulary.pieces}  # rows that configs name and no text reaches
    pieces = vocabulary.closed(pieces | {vocabulary.pieces[index] for index in named - bare})
    most_used = sorted(vocabulary.ids, key=lambda piece: (-counts[vocabulary.ids[piece]], vocabulary.ids[piece]))
    pieces = vocabulary.filled(pieces, len(bare), multiple_of, most_used)
    return sorted({vocabulary.ids[piece] for piece in pieces} | bare)


def _rebuilt(tokenizer: Any, vocabulary: Vocabulary, kept: Sequence[int]) -> Any:
    """The tokenizer with the tokens kept, as it will be loaded from its files: some classes build themselves anew then.

    raises   ModelError where it comes back with other ids.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        spec = rewrite(vocabulary.spec, kept)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
        small = type(tokenizer).from_pretrained(folder)
    small.name_or_path = tokenizer.name_or_path
    expected = {vocabulary.pieces[old]: new for new, old in enumerate(kept) if old in vocabulary.pieces}
    if small.get_vocab() != expected:
        wrong = min(small.get_vocab().items() ^ expected.items())
        raise ModelError(
            f"trim_vocabulary: {type(tokenizer).__name__} numbers its tokens in a way of its own ({wrong[0]!r} "
            "differs) and can't be trimmed. Leave this stage out."
        )
    return small


def _compare(
    vocabulary: Vocabulary, backend: Any, trimmed: Any, kept: Sequence[int], texts: Iterable[list[str]]
) -> dict[str, object]:
    """What texts lose: the share of their tokens that went, of texts that encode as before, of unknown tokens.

    raises   ModelError where a text of kept tokens encodes differently: a tokenizer with a rule that we don't know.
    """
    new, unknown = _numbers(kept), vocabulary.ids.get(vocabulary.unknown or "", _NO_ID)
    unknown_now = _NO_ID if unknown == _NO_ID else int(new[unknown])
    tally: Counter[str] = Counter()
    for chunk in texts:
        for text, old, now in zip(chunk, _encode(backend, chunk), _encode(trimmed, chunk), strict=True):
            numbered = _number(new, old)
            same, gone = np.array_equal(numbered, now), int((numbered < 0).sum())
            # other texts' unknown words may have got stuck in a piece that went: what is known now was not promised
            if not (same or gone or (vocabulary.kind == "WordPiece" and unknown in old)):
                raise ModelError(
                    f"trim_vocabulary: {text[:80]!r} would encode differently afterwards, though all of its tokens "
                    "stay; this tokenizer can't be trimmed. Leave this stage out."
                )
            tally.update(texts=1, same=int(same), gone=gone, tokens=len(old), tokens_after=len(now))
            tally.update(unknown=_occurrences(unknown, old), unknown_after=_occurrences(unknown_now, now))
    return {
        "texts": tally["texts"],
        "texts_same": tally["same"] / max(tally["texts"], 1),
        "tokens_gone": tally["gone"] / max(tally["tokens"], 1),
        "tokens": f"{tally['tokens']} → {tally['tokens_after']}",
        "unknown": f"{tally['unknown']} → {tally['unknown_after']}",
    }


def _occurrences(token: int, ids: NDArray[np.int64]) -> int:
    return int(np.count_nonzero(ids == token))


def _numbers(kept: Sequence[int]) -> NDArray[np.int64]:
    """Old id → new id, −1 where it went."""
    table = np.full(kept[-1] + 1, _NO_ID, dtype=np.int64)
    table[kept] = np.arange(len(kept))
    return table


def _number(new: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(ids < len(new), new[np.minimum(ids, len(new) - 1)], _NO_ID)


# --- the change, and what it did -----------------------------------------------------------------------------------


def _apply(model: Model, tokenizer: Any, kept: Sequence[int]) -> dict[str, object]:
    """Cut the network, put the tokenizer in place, and say what that saved."""
    before, weight = model.parameters, _bytes(model)
    keep_tokens(model.network, kept)
    model.tokenizer = tokenizer
    # a table whose zeros all lay in rows that went has none left to keep
    model.pruned = [each for each in model.pruned if torch.count_nonzero(each) < each.numel()]
    return {"parameters": f"{before} → {model.parameters}", "bytes_saved": weight - _bytes(model)}


def _bytes(model: Model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.network.parameters())


def _facts(model: Model, vocabulary: Vocabulary, counts: NDArray[np.int64], kept: Sequence[int]) -> dict[str, object]:
    rows = model.network.get_input_embeddings().num_embeddings
    generates = f"yes: the head scores {len(kept)} tokens instead of {rows} at every step"
    looks_up = "no: looking a row up takes as long in a smaller table; the file and the memory shrink"
    seen = int(np.count_nonzero(counts))
    return {
        "removed": f"{rows - len(kept):,} of {rows:,} tokens, with their rows of the embeddings",
        "measured": f"{int(counts.sum()):,} tokens of the texts, {seen:,} of them distinct",
        "tokens": f"{rows} → {len(kept)}",
        "tokenizer": vocabulary.kind,
        "tokens_seen": seen,
        "share_unseen": 1 - np.count_nonzero(counts) / len(vocabulary.ids),
        "kept_ids_sample": list(kept[:: max(1, len(kept) // 16)]),
        "faster_here": generates if has_token_head(model.network) else looks_up,
    }
