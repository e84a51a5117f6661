"""Whether an augmentation can be made here, before any work: the language, its words, the models. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from moss_rlhf.strategy.augmentation.applying import ENGLISH, check_language
from moss_rlhf.strategy.augmentation.rows import check_task
from moss_rlhf.strategy.augmentation.synonyms import find_wordnet
from moss_rlhf.strategy.augmentation.words import Language, check_jieba, tell_language


def check_operations(names: Sequence[str], language: Language, task: str) -> None:
    """Whether the operations fit the language and the task, and the words they need are on this machine.

    names    of the operations asked for, as in the recipe.
    raises   RecipeError on one that the language or the task has no use for; MachineError where data is missing.
    """
    check_task(names, task)
    check_language(names, language)
    if language == "zh" and {"swap", "delete"} & set(names):
        check_jieba()
    if set(ENGLISH) & set(names):
        find_wordnet()


def language_of(asked: str, texts: Sequence[str]) -> Language:
    """The language asked for; for 'auto' that of the texts, see `tell_language`."""
    if asked in ("en", "zh", "other"):
        return asked  # type: ignore[return-value]  # mypy does not narrow a str by membership
    return tell_language(texts)
