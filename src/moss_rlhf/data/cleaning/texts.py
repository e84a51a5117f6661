"""Checks of single texts: too empty, in another language, of an odd length, made of boilerplate. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from moss_rlhf.data.cleaning.finding import Hit, shorten
from moss_rlhf.data.cleaning.markup import find_markup

Identify = Callable[[str], tuple[str, float]]

_LENGTH_SCORE = 3.5  # Iglewicz & Hoaglin 1993
_NORMAL_MAD = 0.6745  # the median absolute deviation of a standard normal
_NORMAL_MEAN = 0.7979  # and the mean one
_LEAST_LETTERS = 40  # of a text whose language is asked; identification is unreliable below
_LEAST_IDEOGRAPHS = 15
_SURE = 0.9  # probability of a foreign language from which a text counts as such
_LEAST_SENTENCE = 15  # characters; shorter ones, such as "Thank you.", are no boilerplate
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？]*")
_MOSTLY = 0.5


def empty_texts(texts: Sequence[str], min_letters: int) -> list[Hit]:
    """Texts with fewer than `min_letters` letters and digits, of any script."""
    counts = [sum(map(str.isalnum, text)) for text in texts]
    return [
        Hit(row, f"{count} letters and digits, at least {min_letters} must be")
        for row, count in enumerate(counts)
        if count < min_letters
    ]


def texts_with_markup(texts: Sequence[str]) -> list[Hit]:
    """Texts that hold remnants of HTML."""
    found = ((row, find_markup(text)) for row, text in enumerate(texts))
    return [Hit(row, f"holds {shorten(remnant, 40)}") for row, remnant in found if remnant]


def length_outliers(texts: Sequence[str], reference: Sequence[str]) -> list[Hit]:
    """Texts whose log length is more than 3.5 robust deviations from the median of the reference texts'.

    z = 0.6745 · (log n − median) / MAD, n characters (Iglewicz & Hoaglin 1993). Where more than half of the texts are
    equally long, MAD is 0 and the mean absolute deviation stands in; where all are, nothing is an outlier.
    """
    known = np.log1p([len(text) for text in reference])
    centre = np.median(known)
    distances = np.abs(known - centre)
    spread = np.median(distances) / _NORMAL_MAD or distances.mean() / _NORMAL_MEAN
    if spread == 0:
        return []
    scores = (np.log1p([len(text) for text in texts]) - centre) / spread
    usual = round(float(np.expm1(centre)))
    return [
        Hit(row, f"{len(texts[row])} characters, usual are {usual} (z = {scores[row]:.1f})")
        for row in np.flatnonzero(np.abs(scores) > _LENGTH_SCORE).tolist()
    ]


# --- boilerplate -----------------------------------------------------------------------------------------------------


def sentences_of(text: str) -> list[str]:
    """Sentences and lines of a text, white space and case evened out; those too short to tell anything left out."""
    parts = (" ".join(part.split()).casefold() for part in _SENTENCE.findall(text))
    return [part for part in parts if len(part) >= _LEAST_SENTENCE]


def boilerplate_texts(texts: Sequence[str], least: int, reference: Sequence[str]) -> list[Hit]:
    """Texts with a sentence that stands in at least `least` different texts of the reference.

    Certain where such sentences make up half of the text's characters or more.
    """
    counts = Counter(sentence for text in set(reference) for sentence in set(sentences_of(text)))
    common = {sentence: count for sentence, count in counts.items() if count >= least}
    hits = (_boilerplate(row, text, common) for row, text in enumerate(texts))
    return [hit for hit in hits if hit is not None]


def _boilerplate(row: int, text: str, common: Counter[str] | dict[str, int]) -> Hit | None:
    found = [sentence for sentence in sentences_of(text) if sentence in common]
    if not found:
        return None
    share = sum(map(len, found)) / max(1, len(" ".join(text.split())))
    longest = max(found, key=len)
    reason = f"{shorten(longest, 60)!r} stands in {common[longest]} texts and is {min(share, 1):.0%} of this one"
    return Hit(row, reason, certain=share >= _MOSTLY)


# --- language --------------------------------------------------------------------------------------------------------


def foreign_texts(texts: Sequence[str], reference: Sequence[str], identify: Identify) -> list[Hit]:
    """Texts in another language than most of the reference texts. Short texts are skipped.

    identify   text → (code of its language, probability).
    """
    usual = usual_language(reference, identify)
    if not usual:
        return []
    found = ((row, *identify(text)) for row, text in enumerate(texts) if is_long_enough(text))
    return [
        Hit(row, f"language {code} ({probability:.2f}), most are {usual}")
        for row, code, probability in found
        if code != usual and probability >= _SURE
    ]


def usual_language(texts: Sequence[str], identify: Identify) -> str:
    """The language of most texts that are long enough to tell; "" where none is."""
    codes = Counter(identify(text)[0] for text in texts if is_long_enough(text))
    return min(codes, key=lambda code: (-codes[code], code)) if codes else ""


def is_long_enough(text: str) -> bool:
    """Whether a text has letters enough to tell its language: 40, or 15 ideographs."""
    letters = [character for character in text if character.isalpha()]
    ideographs = sum("\u3040" <= character <= "\u9fff" or "\uac00" <= character <= "\ud7a3" for character in letters)
    return len(letters) >= _LEAST_LETTERS or ideographs >= _LEAST_IDEOGRAPHS


def language_identifier() -> Identify:
    """py3langid's naive Bayes over 97 languages (Lui & Baldwin 2012), with probabilities."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def identify(text: str) -> tuple[str, float]:
        code, probability = identifier.classify(text)
        return str(code), float(probability)

    return identify
