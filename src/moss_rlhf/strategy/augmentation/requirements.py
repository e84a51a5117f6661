"""Whether an augmentation can be made here, before any work: the language, its words, the models. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from moss_rlhf.errors import RecipeError
from moss_rlhf.strategy.augmentation.rows import check_task
from moss_rlhf.strategy.augmentation.synonyms import find_wordnet
from moss_rlhf.strategy.augmentation.words import Language, check_jieba, tell_language

_ENGLISH = ("synonym", "insert")
_LANGUAGES = {"zh": "Chinese", "other": "a language other than English"}
_WHY = {
    "synonym": "its synonyms are WordNet's, which is English",
    "insert": "what it inserts are WordNet's synonyms, which are English",
    "keyboard": "a QWERTY keyboard's keys are Latin letters",
}


def check_operations(names: Sequence[str], language: Language, task: str) -> None:
    """Whether the operations fit the language and the task, and the words they need are on this machine.

    names    of the operations asked for, as in the recipe.
    raises   RecipeError on one that the language or the task has no use for; MachineError where data is missing.
    """
    check_task(names, task)
    unfit = (*_ENGLISH, "keyboard") if language == "zh" else _ENGLISH if language == "other" else ()
    if wrong := [name for name in names if name in unfit]:
        fitting = "swap, delete, typo, punctuation, masked_lm or back_translation"
        raise RecipeError(
            f"data.augment.{wrong[0]}: the texts are {_LANGUAGES[language]}, and {_WHY[wrong[0]]}. Give {fitting}"
            f"{'' if language == 'other' else ', or set data.augment.language if that is wrong'}."
        )
    if language == "zh" and {"swap", "delete"} & set(names):
        check_jieba()
    if set(_ENGLISH) & set(names):
        find_wordnet()


def language_of(asked: str, texts: Sequence[str]) -> Language:
    """The language asked for; for 'auto' that of the texts, see `tell_language`."""
    if asked in ("en", "zh", "other"):
        return asked  # type: ignore[return-value]  # mypy does not narrow a str by membership
    return tell_language(texts)
