"""Operations on whole texts and on questions with their answers; what an operation is made of."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from moss_rlhf.errors import RecipeError, nearest
from moss_rlhf.recipe import RATES, AugmentSpec
from moss_rlhf.recipe.options import check_options
from moss_rlhf.strategy.augmentation.draws import Draws
from moss_rlhf.strategy.augmentation.operations import (
    CHINESE_MARKS,
    Change,
    changes,
    delete_words,
    insert_punctuation,
    insert_synonyms,
    press_neighbours,
    replace_with_synonyms,
    slip_characters,
    slip_letters,
    swap_words,
    with_synonyms,
)
from moss_rlhf.strategy.augmentation.synonyms import wordnet_synonyms
from moss_rlhf.strategy.augmentation.words import (
    FREE,
    Language,
    Split,
    is_han,
    split_characters,
    splitter,
)

Wanted = Callable[[str], object]
"""Whether a word may be changed, or what it may be changed for: nothing where it may not."""
Rewrite = Callable[[Sequence[str], Sequence[Draws]], list[str]]


@dataclass(frozen=True)
class WordOperation:
    """A change of single words: how often (a share of the free words), what it does, and how texts come apart."""

    name: str
    rate: float
    change: Change
    split: Split
    free: Wanted


@dataclass(frozen=True)
class Rewriting:
    """A change of whole texts by a model, many at a time: (texts, a stream of draws for each) → new texts."""

    name: str
    rewrite: Rewrite


Operation = WordOperation | Rewriting


def word_operations(rates: Mapping[str, float], language: Language) -> list[WordOperation]:
    """The operations on words and characters with a rate above 0, in the order in which they are applied.

    rates      {'synonym', 'insert', 'swap', 'delete', 'typo', 'keyboard' or 'punctuation': share of the words}.
    raises     RecipeError on an unknown name or language, a rate that a recipe could not hold, or an operation that the
               language has no use for; MachineError where WordNet or jieba is needed and missing.
    """
    _check_rates(rates, language)
    asked = {name: rate for name, rate in rates.items() if rate > 0}
    needs_words = {"synonym", "insert", "swap", "delete"} & set(asked)
    split = splitter(language) if needs_words or language != "zh" else split_characters
    synonyms = wordnet_synonyms() if {"synonym", "insert"} & set(asked) else _no_synonyms
    chinese, free = language == "zh", FREE[language]
    choices = with_synonyms(free, synonyms)
    punctuation = partial(insert_punctuation, marks=CHINESE_MARKS, space="") if chinese else insert_punctuation
    made: dict[str, tuple[Change, Split, Wanted]] = {
        "synonym": (replace_with_synonyms, split, choices),
        "insert": (insert_synonyms, split, choices),
        "swap": (swap_words, split, free),
        "delete": (delete_words, split, free),
        "typo": (slip_characters, split_characters, free) if chinese else (slip_letters, split, free),
        "keyboard": (press_neighbours, split, free),
        "punctuation": (punctuation, split, bool),
    }
    return [WordOperation(name, asked[name], *how) for name, how in made.items() if name in asked]


def _check_rates(rates: Mapping[str, float], language: str) -> None:
    for name in rates:
        if name not in RATES:
            raise RecipeError(f"augment: there is no operation {name!r}; {nearest(name, RATES)}")
    check_options(AugmentSpec, rates, "augment")
    if language not in FREE:
        raise RecipeError(f"augment.language: {language!r} can't be used; it must be {', '.join(FREE)}.")
    check_language([name for name, rate in rates.items() if rate > 0], language)


def check_language(names: Sequence[str], language: str) -> None:
    """RecipeError where an operation needs the words or letters of another language."""
    unfit = (*ENGLISH, "keyboard") if language == "zh" else ENGLISH if language == "other" else ()
    if wrong := [name for name in names if name in unfit]:
        fitting = "swap, delete, typo, punctuation, masked_lm or back_translation"
        raise RecipeError(
            f"data.augment.{wrong[0]}: the texts are {_LANGUAGES[language]}, and {_WHY[wrong[0]]}. Give {fitting}"
            f"{'' if language == 'other' else ', or set data.augment.language if that is wrong'}."
        )


ENGLISH = ("synonym", "insert")
_LANGUAGES = {"zh": "Chinese", "other": "a language other than English"}
_WHY = {
    "synonym": "its synonyms are WordNet's, which is English",
    "insert": "what it inserts are WordNet's synonyms, which are English",
    "keyboard": "a QWERTY keyboard's keys are Latin letters",
}


def _no_synonyms(word: str) -> Sequence[str]:
    return ()


def change_text(text: str, operations: Sequence[WordOperation], draws: Draws) -> str:
    """The text after each operation in turn: rate · (its words) changes each, rounded down, at least one."""
    words, split = [text], None
    for operation in operations:
        if operation.split is not split:
            split = operation.split
            words = split("".join(words))
        words = operation.change(words, operation.free, changes(operation.rate, len(words)), draws)
    return "".join(words)


def change_pieces(pieces: Sequence[str], operation: WordOperation, draws: Draws) -> list[str]:
    """Pieces of one text, each changed by itself; the number of changes is that of the whole text."""
    split = [operation.split(piece) for piece in pieces]
    owners = [piece for piece, words in enumerate(split) for word in words if operation.free(word)]
    chosen = draws.some(owners, changes(operation.rate, len(owners)))
    return [
        "".join(operation.change(words, operation.free, chosen.count(piece), draws)) if piece in chosen else text
        for piece, (text, words) in enumerate(zip(pieces, split, strict=True))
    ]


class Answer(NamedTuple):
    """A span of a context: context[start : start + len(text)] == text."""

    start: int
    text: str


class Answerable(NamedTuple):
    """A question, the context that answers it, and where."""

    context: str
    question: str
    answers: tuple[Answer, ...]


def augment_answerable(
    context: str,
    question: str,
    answers: Sequence[tuple[int, str]],
    operations: Sequence[WordOperation],
    draws: Draws,
    in_question: frozenset[str] = frozenset({"synonym", "typo", "keyboard", "punctuation"}),
) -> Answerable:
    """Change a context and its question, never a word that an answer touches; the answers' places are found anew.

    answers      (start, text) in characters, context[start : start + len(text)] == text, as in SQuAD.
    operations   in turn; those whose names are not `in_question` leave the question alone.
    raises       ValueError where an answer does not stand at its start.
    """
    pieces = [Answer(start, text) for start, text in answers]
    for operation in operations:
        context, pieces = _change_context(context, pieces, operation, draws)
    question = change_text(question, [operation for operation in operations if operation.name in in_question], draws)
    return Answerable(context, question, tuple(pieces))


def _change_context(
    context: str, answers: Sequence[Answer], operation: WordOperation, draws: Draws
) -> tuple[str, list[Answer]]:
    """One operation on what stands between the words that answers touch."""
    kept = protected_spans(context, answers)
    ends = [0, *(end for _, end in kept)]
    starts = [*(start for start, _ in kept), len(context)]
    new = change_pieces([context[end:start] for end, start in zip(ends, starts, strict=True)], operation, draws)
    changed, shifts = new[0], []
    for (start, end), after in zip(kept, new[1:], strict=True):
        shifts.append(len(changed) - start)
        changed += context[start:end] + after
    owners = [bisect_right(starts[:-1], start) - 1 for start, _ in answers]
    return changed, [Answer(start + shifts[own], text) for (start, text), own in zip(answers, owners, strict=True)]


def protected_spans(context: str, answers: Sequence[tuple[int, str]]) -> list[tuple[int, int]]:
    """(start, end) of the stretches that answers touch, whole words, joined where they meet.

    The white space behind belongs to a stretch, so that nothing put after it grows onto its last word. A Chinese
    character is a word.
    """
    spans: list[tuple[int, int]] = []
    for start, text in sorted(answers):
        found = context[max(0, start) : start + len(text)]
        if start < 0 or found != text:
            raise ValueError(f"the answer {text!r} does not stand at {start} of its context, where {found!r} stands")
        first, end = _stretch(context, start, start + len(text))
        if spans and first <= spans[-1][1]:
            first, end = spans[-1][0], max(end, spans.pop()[1])
        spans.append((first, end))
    return spans


def _stretch(context: str, start: int, end: int) -> tuple[int, int]:
    while start and _goes_on(context[start - 1]):
        start -= 1
    while end < len(context) and _goes_on(context[end]):
        end += 1
    while end < len(context) and context[end].isspace():
        end += 1
    return start, end


def _goes_on(character: str) -> bool:
    """Whether a word goes on with this character."""
    return not character.isspace() and not is_han(character)
