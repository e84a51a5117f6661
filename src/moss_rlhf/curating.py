"""Splits → the rows that a run trains on: collected, cleaned and balanced, as the recipe's `data` asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.checking import example_texts
from moss_rlhf.data import Column, Splits
from moss_rlhf.data.balance import balance_train
from moss_rlhf.data.chosen import Chosen, corpus_rows, keep_chosen, rows_of_texts, write_collected
from moss_rlhf.data.cleaning import Cleaned, Embed, clean_splits, write_findings
from moss_rlhf.data.cleaning.probe import probe_answers
from moss_rlhf.data.scanning import text_digest
from moss_rlhf.errors import DataError
from moss_rlhf.evaluation.statistics import paired_difference
from moss_rlhf.files import digest, file_digest, new_file, read_json, write_json
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.locate import weight_files
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import CollectSpec, DataSpec
from moss_rlhf.rundir import RunDirectory
from moss_rlhf.tasks.collecting import NONE_FITS, Sought, choose_texts, language_model
from moss_rlhf.tasks.embedding import open_embedder
from moss_rlhf.tasks.language import check_language_model
from moss_rlhf.tasks.metrics import accuracy
from moss_rlhf.tasks.row_statistics import confusion_cells

_CONFIDENCE, _RESAMPLES = 0.95, 2000
_FORM = 1  # of the choices kept; a higher number makes older ones be made anew


def curate(
    splits: Splits,
    columns: Sequence[Column],
    spec: DataSpec,
    *,
    seed: int,
    place: RunDirectory,
    source: str,
    open_model: Callable[[], Model],
    progress: Progress,
) -> Splits:
    """Collect, clean, then balance; collected.csv lists what was chosen, findings.csv what cleaning found.

    Collecting comes first: what is usual in length, language and labels is the task's usual, not the corpus's.

    source       names the model's files, for what is kept of it.
    open_model   the recipe's own model, opened only where texts must be embedded.
    """
    place.findings.unlink(missing_ok=True)
    place.collected.unlink(missing_ok=True)
    if spec.collect is not None:
        splits = _collect(splits, columns, spec, spec.collect, seed, place, source, open_model, progress)
    if spec.clean is not None and (spec.clean.checks or spec.clean.ablate):
        embed = TextVectors(place.data / f"vectors-{source[:16]}.npz", open_model, progress)
        cleaned = clean_splits(splits, columns, spec.clean, seed=seed, embed=embed, progress=progress)
        write_findings(cleaned.findings, place.findings)
        before, splits = splits, cleaned.splits
        if spec.clean.ablate:
            splits = _with_effect(splits, cleaning_effect(before, cleaned, columns, embed, seed))
    return splits if spec.balance == "none" else balance_train(splits, columns, spec.balance, seed)


def _collect(
    splits: Splits,
    columns: Sequence[Column],
    spec: DataSpec,
    asked: CollectSpec,
    seed: int,
    place: RunDirectory,
    source: str,
    open_model: Callable[[], Model],
    progress: Progress,
) -> Splits:
    """Only the texts that fit stay, in train and in a share held out of it; a choice once made is kept in a file."""
    examples = example_texts(spec, columns)
    name = digest([_FORM, splits.digest, asked.model_dump(mode="json"), examples, source, *_reader(asked), seed])
    kept = place.data / f"collected-{name[:16]}.json"
    if not kept.exists():
        sought = _sought(asked, examples, open_model)
        texts = choose_texts(corpus_rows(splits, columns, spec.corpus), sought, seed, progress)
        found = rows_of_texts(texts, corpus_rows(splits, columns, spec.corpus))
        write_json(kept, [dataclasses.astuple(entry) for entry in found])
    chosen = [Chosen(*entry) for entry in read_json(kept)]
    if not chosen:
        raise DataError(f"data.collect: {NONE_FITS}")
    collected, listed = keep_chosen(splits, columns, spec.corpus, chosen, _by(asked))
    write_collected(listed, place.collected)
    return collected


def _sought(asked: CollectSpec, examples: list[str] | None, open_model: Callable[[], Model]) -> Sought:
    """What is looked for, with the models that it takes opened."""
    compares = examples is not None or asked.diversity > 0
    return Sought(
        count=asked.count,
        examples=examples,
        keywords=asked.keywords,
        embed=open_embedder(open_model()) if compares else None,
        language=None if asked.perplexity is None else language_model(asked.perplexity, "data.collect.perplexity"),
        max_perplexity=asked.max_perplexity,
        diversity=asked.diversity,
    )


def _reader(asked: CollectSpec) -> list[str]:
    """Names the files of the model that perplexity is of."""
    if asked.perplexity is None:
        return []
    place = check_language_model(asked.perplexity, "data.collect.perplexity")
    return [file_digest(file) for file in [*weight_files(place), *sorted(place.glob("*.json"))]]


def _by(asked: CollectSpec) -> str:
    """What ranks, then what filters, in words."""
    ways = {
        "likeness to the examples": asked.like is not None,
        "perplexity": asked.perplexity is not None,
        f"keywords ({', '.join(asked.keywords)})": bool(asked.keywords),
        "diversity": asked.diversity > 0,
    }
    return "; ".join(way for way, holds in ways.items() if holds)


def cleaning_effect(
    before: Splits, cleaned: Cleaned, columns: Sequence[Column], embed: Embed, seed: int
) -> dict[str, float]:
    """What cleaning does to a cheap classifier's accuracy on the rows of validation that are left.

    The classifier is a logistic regression on embeddings of the recipe's model, trained on train as it was and is.

    returns   {"raw_accuracy", "cleaned_accuracy", "delta", "low", "high", "p_value"}: delta is cleaned − raw, with its
              paired bootstrap interval and McNemar's p-value.
    """
    sets = [_texts_and_labels(rows, columns) for rows in (before.train, cleaned.splits.train)]
    texts, truth = _texts_and_labels(cleaned.splits.validation, columns)
    shown = embed(texts)
    raw, clean = (probe_answers(embed(train), labels, shown) for train, labels in sets)
    classes = len(before.labels)
    difference = paired_difference(
        confusion_cells(truth, raw, classes),
        confusion_cells(truth, clean, classes),
        metric=accuracy,
        confidence=_CONFIDENCE,
        resamples=_RESAMPLES,
        seed=seed,
    )
    accuracies = {"raw_accuracy": float((raw == truth).mean()), "cleaned_accuracy": float((clean == truth).mean())}
    return accuracies | {name: float(value) for name, value in difference.items()}  # type: ignore[arg-type]  # floats all


def _with_effect(splits: Splits, effect: dict[str, float]) -> Splits:
    facts = splits.facts | {"train": splits.facts["train"] | {"cleaning_effect": effect}}
    return dataclasses.replace(splits, facts=facts)


def _texts_and_labels(rows: Any, columns: Sequence[Column]) -> tuple[list[str], NDArray[np.int64]]:
    names = [column.name for column in columns if column.kind == "text"]
    label = next(column.name for column in columns if column.kind == "label")
    texts = [" ".join(cells) for cells in zip(*(rows[name][:] for name in names), strict=True)]
    return texts, np.asarray(rows[label][:], dtype=np.int64)


class TextVectors:
    """Embeds texts, each once: vectors are kept in a file by the text's digest, so a run that goes on has them."""

    def __init__(self, place: Path, open_model: Callable[[], Model], progress: Progress) -> None:
        self._place, self._open_model, self._progress = place, open_model, progress
        self._known: dict[bytes, NDArray[np.float32]] | None = None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(texts, hidden size) vectors of length 1."""
        if self._known is None:
            self._known = self._read()
        names = [text_digest([text]) for text in texts]
        missing = {name: text for name, text in zip(names, texts, strict=True) if name not in self._known}
        if missing:
            from moss_rlhf.tasks.embedding import embed_texts

            vectors = embed_texts(self._open_model(), list(missing.values()), progress=self._progress)
            self._known |= dict(zip(missing, vectors, strict=True))
            self._write(self._known)
        return np.stack([self._known[name] for name in names])

    def _read(self) -> dict[bytes, NDArray[np.float32]]:
        if not self._place.exists():
            return {}
        with np.load(self._place, allow_pickle=False) as file:
            return {name.tobytes(): vector for name, vector in zip(file["names"], file["vectors"], strict=True)}

    def _write(self, known: dict[bytes, NDArray[np.float32]]) -> None:
        names = np.frombuffer(b"".join(known), dtype=np.uint8).reshape(len(known), -1)
        with new_file(self._place) as partial, partial.open("wb") as file:
            np.savez(file, allow_pickle=False, names=names, vectors=np.stack(list(known.values())))
