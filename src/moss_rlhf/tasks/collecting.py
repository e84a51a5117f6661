"""Texts for a task out of many, by likeness to examples, words or perplexity; diverse. `collect` reads a corpus."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.collecting import Candidate, CorpusRow, Keywords, Pool, choose_diverse, read_corpus, read_examples
from moss_rlhf.errors import DataError, RecipeError
from moss_rlhf.files import new_file
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CollectSpec
from moss_rlhf.recipe.collect import collect_fault
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks.embedding import Embed, open_embedder
from moss_rlhf.tasks.language import check_language_model

_AT_ONCE = 512
_POOL = 5  # candidates kept for each text wanted, to choose diverse ones from
_PERPLEXITY_TOKENS = 256
NONE_FITS = "no text fits. Give other keywords, or a larger max_perplexity."


@follows(CollectSpec, "collect")
def collect(
    corpus: str | Path,
    *,
    count: int,
    like: str | Path | Sequence[str] | None = None,
    keywords: Sequence[str] = (),
    model: str | Model | None = None,
    perplexity: str | Model | None = None,
    max_perplexity: float | None = None,
    diversity: float = 0.3,
    column: str = "text",
    seed: int = 0,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Choose `count` texts of a corpus. The corpus is read once; memory holds 5 · count candidates.

    What ranks is the first given of: likeness to the nearest example (cosine of mean-pooled embeddings), perplexity
    (the lower the better), how many of the keywords a text holds. Texts without any of the keywords are passed over,
    and those above max_perplexity, or of one token, which have none. Of the best candidates diverse ones are taken, by
    maximal marginal relevance.

    corpus       csv, tsv, txt, json, jsonl or parquet, also .gz.
    like         example texts, or a file of them.
    model        a checkpoint or hub id whose embeddings compare texts; needed for `like` and for diversity above 0.
    perplexity   a causal language model, or its checkpoint.
    diversity    0 takes the best alone, 1 the farthest apart.
    column       where texts stand, in corpus and examples.
    output       a jsonl file: the chosen rows, the first chosen first.
    returns      [{"text", …the row's other fields, "line", "score", "reason"}].
    raises       RecipeError on arguments that don't fit; DataError where a file can't be read or nothing is found.
    """
    _check(like, keywords, model, perplexity, max_perplexity, diversity)
    examples = read_examples(like, [column], "collect.like") if isinstance(like, str | Path) else like
    sought = Sought(
        count,
        examples,
        keywords,
        open_embedder(model) if model is not None and (like is not None or diversity > 0) else None,
        language_model(perplexity, "collect.perplexity") if perplexity is not None else None,
        max_perplexity,
        diversity,
    )
    chosen = choose_texts(read_corpus(corpus, column), sought, seed, progress or Progress(quiet=True))
    if not chosen:
        raise DataError(f"{corpus}: {NONE_FITS}")
    found = [_row(candidate, column) for candidate in chosen]
    if output is not None:
        _write(found, Path(output))
    return found


def _check(
    like: object, keywords: Sequence[str], model: object, perplexity: object, most: float | None, diversity: float
) -> None:
    if fault := collect_fault(like, keywords, perplexity is not None, most):
        raise RecipeError(f"collect: {fault}")
    if model is None and (like is not None or diversity > 0):
        raise RecipeError(
            "collect: model: is needed to compare texts; give a checkpoint or hub id (or diversity 0 and no `like`)."
        )


@dataclass(frozen=True)
class Sought:
    """What is looked for, by open models.

    examples   texts to be like; None: likeness does not rank.
    embed      compares texts; may be None where there are no examples and diversity is 0.
    language   a causal language model, for perplexities.
    """

    count: int
    examples: Sequence[str] | None
    keywords: Sequence[str]
    embed: Embed | None
    language: Model | None
    max_perplexity: float | None
    diversity: float


def choose_texts(rows: Iterable[CorpusRow], sought: Sought, seed: int, progress: Progress) -> list[Candidate]:
    """The texts to take, the first chosen first, no text twice. Rows are gone through once; see `collect`.

    rows   (line, text, other fields); memory holds 512 of them and 5 · count candidates.
    """
    scorer = _Scorer(sought)
    pool = Pool(sought.count * (_POOL if sought.diversity else 1), seed)
    with progress.bar("reading the corpus", None) as bar:
        for batch in _batches(iter(rows)):
            for candidate in scorer.candidates(batch):
                pool.offer(candidate)
            bar.advance(len(batch))
    return _choose(pool.best(), sought.count, sought.diversity)


class _Scorer:
    """Scores rows in batches."""

    def __init__(self, sought: Sought) -> None:
        self._keywords, self._words = Keywords(sought.keywords), len(sought.keywords)
        self._embed = sought.embed if sought.examples is not None or sought.diversity > 0 else None
        self._language = sought.language
        self._most = sought.max_perplexity or sys.float_info.max  # a text of one token has an infinite one, no rank
        self._examples = sought.embed(sought.examples) if sought.embed and sought.examples is not None else None

    def candidates(self, rows: list[CorpusRow]) -> Iterator[Candidate]:
        found = [self._keywords.found(text) for _, text, _ in rows]
        kept = [place for place in range(len(rows)) if found[place] or not self._words]
        texts = [rows[place][1] for place in kept]
        if not texts:
            return
        perplexities = text_perplexities(self._language, texts) if self._language else None
        vectors = self._embed(texts) if self._embed else None
        for index, place in enumerate(kept):
            if perplexities is not None and perplexities[index] > self._most:
                continue
            vector = None if vectors is None else vectors[index]
            value = None if perplexities is None else float(perplexities[index])
            score, reason = self._judge(vector, found[place], value)
            line, text, fields = rows[place]
            yield Candidate(line, text, score, reason, vector, fields)

    def _judge(self, vector: Any, words: list[str], perplexity: float | None) -> tuple[float, str]:
        """What ranks, and all reasons in words."""
        reasons, scores = [], []
        if self._examples is not None:
            likeness = self._examples @ vector
            scores.append(float(likeness.max()))
            reasons.append(f"like example {int(likeness.argmax()) + 1} ({likeness.max():.3f})")
        if perplexity is not None:
            scores.append(-float(np.log(perplexity)))
            reasons.append(f"perplexity {perplexity:.1f}")
        if words:
            scores.append(len(words) / self._words)
            reasons.append(f"holds {', '.join(words)}")
        return scores[0], "; ".join(reasons)


def language_model(model: str | Model, field: str) -> Model:
    """A causal language model, opened; `field` says where its name stands, for errors."""
    from moss_rlhf.tasks.loading import load

    found = model if isinstance(model, Model) else load(check_language_model(model, field), task="text-generation")
    if found.task != "text-generation":
        raise RecipeError(f"{field}: is a model for {found.task}; give a causal language model.")
    return found


def text_perplexities(model: Model, texts: Sequence[str]) -> NDArray[np.float64]:
    """Perplexity of the first 256 tokens of each text, (texts,); infinite where there are fewer than two."""
    from datasets import Dataset

    from moss_rlhf.tasks import TextGeneration
    from moss_rlhf.tasks.language import perplexity

    most = min(_PERPLEXITY_TOKENS, model.max_length)
    tokens = model.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
    long = [place for place, ids in enumerate(tokens) if len(ids) > 1]
    values = np.full(len(texts), np.inf)
    if long:
        rows = Dataset.from_dict({"input_ids": [tokens[place] for place in long]})
        rows = rows.add_column("length", [len(tokens[place]) for place in long])
        values[long] = perplexity(TextGeneration().scores(model.network, rows, model.tokenizer))
    return values


def _batches(rows: Iterator[CorpusRow]) -> Iterator[list[CorpusRow]]:
    while batch := list(islice(rows, _AT_ONCE)):
        yield batch


def _choose(candidates: list[Candidate], count: int, diversity: float) -> list[Candidate]:
    if not diversity or not candidates:
        return candidates[:count]
    vectors = np.stack([candidate.vector for candidate in candidates if candidate.vector is not None])
    scores = np.array([candidate.score for candidate in candidates])
    return [candidates[place] for place in choose_diverse(scores, _centred(vectors), count, diversity)]


def _centred(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less their mean, of length 1: a network's vectors share a direction, and without it they differ visibly."""
    rest = vectors - vectors.mean(axis=0)
    centred: NDArray[np.float32] = rest / np.maximum(np.linalg.norm(rest, axis=1, keepdims=True), 1e-12)
    return centred


def _row(candidate: Candidate, column: str) -> dict[str, Any]:
    listed = {"line": candidate.line, "score": round(candidate.score, 6), "reason": candidate.reason}
    return {column: candidate.text} | candidate.fields | listed


def _write(rows: Sequence[dict[str, Any]], place: Path) -> None:
    with new_file(place) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
