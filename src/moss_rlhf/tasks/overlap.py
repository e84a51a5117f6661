"""How much of a written text stands in its reference: BLEU and chrF, as functions of sums over rows.

BLEU   Papineni et al. 2002, in sacrebleu's form (Post 2018, arXiv:1804.08771): its 13a words, or Chinese characters.
chrF   Popović 2015, character n-grams of up to 6, recall counting twice as much as precision.

Both are 0 to 1 here; others print 100 times that.
"""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import MachineError

Numbers = NDArray[np.float64]

_WORDS, _LETTERS = 4, 6  # the longest n-grams
_RECALL = 2**2  # β²
_BLEU = 2 + 2 * _WORDS  # numbers a row: both lengths, n-grams that match, n-grams written
_HAN = ("\u3400", "\u9fff")
_HAN_SHARE = 0.3  # of the references' letters


def overlap(written: Sequence[str], references: Sequence[str]) -> Numbers:
    """The numbers (rows, 28) of which `bleu` and `chrf` are functions, once summed over rows.

    raises   MachineError where sacrebleu is not installed; ValueError where there are no rows, or not equally many.
    """
    if len(written) != len(references) or not references:
        raise ValueError(f"written and references must be equally many, got {len(written)} and {len(references)}")
    check_sacrebleu()
    from sacrebleu.metrics import BLEU

    counting = BLEU(tokenize="zh" if _is_chinese(references) else "13a", effective_order=True)
    rows = []
    for text, reference in zip(written, references, strict=True):
        found = counting.sentence_score(text, [reference])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals, *_letters(text, reference)])
    return np.array(rows, dtype=np.float64)


def check_sacrebleu() -> None:
    """MachineError where it is not installed."""
    if not has_sacrebleu():
        raise MachineError(
            "evaluate.translate: BLEU needs the package sacrebleu, which is not installed. Run "
            "pip install 'moss-rlhf[translation]', or set evaluate.translate to 0."
        )


def has_sacrebleu() -> bool:
    return importlib.util.find_spec("sacrebleu") is not None


def bleu(sums: Numbers) -> Numbers:
    """Sums (…, 28) → BLEU of 1- to 4-grams (…), 0 to 1.

    An order without a match counts as half a match, the next one as a quarter (sacrebleu's exp smoothing). Without any
    match, or with too few words for a 4-gram, it is 0.
    """
    written, reference = sums[..., 0], sums[..., 1]
    matches, totals = sums[..., 2 : 2 + _WORDS], sums[..., 2 + _WORDS : _BLEU]
    halvings = np.cumsum(matches == 0, axis=-1)
    precisions = np.where(matches > 0, matches, 0.5**halvings) / np.maximum(totals, 1)
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(written, 1)))
    score: Numbers = brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.where(matches.any(axis=-1) & totals.all(axis=-1), score, 0.0)


def chrf(sums: Numbers) -> Numbers:
    """Sums (…, 28) → chrF2 (…), 0 to 1: of mean precision and mean recall over the orders that both texts hold."""
    written, reference, matches = np.split(sums[..., _BLEU:], 3, axis=-1)
    held = (written > 0) & (reference > 0)
    orders = np.maximum(held.sum(axis=-1), 1)
    precision = np.where(held, matches / np.maximum(written, 1), 0).sum(axis=-1) / orders
    recall = np.where(held, matches / np.maximum(reference, 1), 0).sum(axis=-1) / orders
    score: Numbers = (1 + _RECALL) * precision * recall / np.maximum(_RECALL * precision + recall, 1e-300)
    return score


def _letters(text: str, reference: str) -> Iterator[int]:
    """Of each order up to 6: n-grams written, n-grams of the reference, n-grams in both; white space is left out."""
    pairs = list(zip(_ngrams(text), _ngrams(reference), strict=True))
    yield from (first.total() for first, _ in pairs)
    yield from (second.total() for _, second in pairs)
    yield from ((first & second).total() for first, second in pairs)


def _ngrams(text: str) -> Iterator[Counter[str]]:
    letters = "".join(text.split())
    for order in range(1, _LETTERS + 1):
        yield Counter(letters[start : start + order] for start in range(len(letters) - order + 1))


def _is_chinese(texts: Sequence[str]) -> bool:
    letters = sum(character.isalpha() for text in texts for character in text)
    return sum(_HAN[0] <= character <= _HAN[1] for text in texts for character in text) > _HAN_SHARE * letters
