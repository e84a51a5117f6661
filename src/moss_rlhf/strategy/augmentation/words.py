"""How a text comes apart into words, and which of them may be changed. `"".join(words)` is the text, always.

A word carries the white space and the punctuation around it: `parts` takes them off. Words that turn a sentence's
meaning round (not, never, 不, 没 …) are never free to be changed, and neither are links and tags.
"""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from moss_rlhf.errors import DataError, MachineError

Language = Literal["en", "zh", "other"]
Split = Callable[[str], list[str]]
IsFree = Callable[[str], bool]

_CHINESE_SHARE = 0.3  # of the letters: Chinese texts hold Latin names and numbers
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_COUNTED = re.compile(
    rf"(?P<han>[{_HAN}])|(?P<kana>[\u3040-\u30ff])"
    r"|(?P<other>[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff])"
)
_IS_HAN = re.compile(f"[{_HAN}]").search
_SPACED = re.compile(r"\s*\S+\s*")
_PARTS = re.compile(r"([\W_]*)(.*?)([\W_]*)", re.DOTALL)
_CHARACTERS = re.compile(rf"[{_HAN}]|\s+|[^\s{_HAN}]+")
_NEGATIONS = frozenset(
    [
        *("no", "not", "never", "none", "nobody", "nothing", "nowhere", "neither", "nor", "cannot", "without"),
        *("hardly", "barely", "scarcely"),
    ]
)
_CHINESE_NEGATIONS = frozenset("不没沒无無非未别別莫勿否")
_CACHED = 2**16  # different words: a language's texts hold few


@lru_cache(_CACHED)
def parts(word: str) -> tuple[str, str, str]:
    """What stands before a word's letters, the letters, and what stands after: `"(film, "` → `("(", "film", ", ")`."""
    match = _PARTS.fullmatch(word)
    return (match[1], match[2], match[3]) if match else ("", word, "")


@lru_cache(_CACHED)
def is_free(word: str) -> bool:
    """Whether a word of a language that writes spaces may be changed: letters, no negation, link or tag."""
    before, core, _ = parts(word)
    if not core or before.lstrip().startswith(("'", "’")) or any(mark in word for mark in ("<", ">", "@", "://")):
        return False
    folded = core.casefold()
    return folded not in _NEGATIONS and not folded.endswith(("n't", "n’t"))


@lru_cache(_CACHED)
def is_free_chinese(word: str) -> bool:
    """The same for Chinese words, and for single characters."""
    return bool(_IS_HAN(word)) and not _CHINESE_NEGATIONS & set(word)


def is_han(character: str) -> bool:
    """Whether it is a Chinese character."""
    return bool(_IS_HAN(character))


def split_spaced(text: str) -> list[str]:
    """Words of a language that writes spaces, each with the white space after it (the first also with that before)."""
    if text.isprintable() and "  " not in text and text[:1] != " " and text[-1:] != " ":  # five times as fast
        return text.replace(" ", " \0").split("\0") if text else []
    return _SPACED.findall(text) or ([text] if text else [])


def split_characters(text: str) -> list[str]:
    """Chinese characters one by one; what stands between them in runs."""
    return _CHARACTERS.findall(text)


def splitter(language: Language) -> Split:
    """The function that takes a language's texts apart into words: at spaces, or for Chinese by jieba.

    raises   MachineError where jieba is not installed.
    """
    return split_spaced if language != "zh" else _jieba().lcut


def _jieba() -> Any:
    check_jieba()
    with warnings.catch_warnings():  # of the age of its code
        warnings.simplefilter("ignore")
        import jieba

        jieba.setLogLevel("WARNING")
        jieba.initialize()  # a second, once a process
    return jieba


def check_jieba() -> None:
    """MachineError where jieba is not installed."""
    if importlib.util.find_spec("jieba") is None:
        raise MachineError(
            "data.augment: Chinese words need the package jieba, which is not installed. "
            "Run pip install 'moss-rlhf[words]', or ask for typo or punctuation only."
        )


FREE: Mapping[Language, IsFree] = {"en": is_free, "other": is_free, "zh": is_free_chinese}


def tell_language(texts: Sequence[str]) -> Language:
    """'zh' where at least 30 % of the letters are Chinese characters, else 'en'. Other languages must be named.

    raises   DataError where the texts are of a script that writes no spaces and is not Chinese.
    """
    letters = sum(character.isalpha() for text in texts for character in text)
    kinds = [match.lastgroup for text in texts for match in _COUNTED.finditer(text)]
    han, kana, other = (kinds.count(name) for name in ("han", "kana", "other"))
    if kana > 0.1 * letters or other > 0.1 * letters:
        script = "Japanese" if kana > other else "Thai, Lao, Khmer or Burmese"
        raise DataError(
            f"data.augment.language: the texts look {script}, whose words can't be told apart here (known: languages "
            "that write spaces, and Chinese). Leave data.augment out."
        )
    return "zh" if letters and han >= _CHINESE_SHARE * letters else "en"
