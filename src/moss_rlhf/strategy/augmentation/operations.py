"""The operations on words and characters: pure functions of a text's words.

Each takes `words` (see words.py), which of them are `free` to be changed, how many changes to make, and the draws; and
returns new words. EDA: Wei & Zou 2019, arXiv:1901.11196; AEDA: Karimi et al. 2021, arXiv:2108.13230.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import compress
from typing import Any

from moss_rlhf.strategy.augmentation.draws import Draws
from moss_rlhf.strategy.augmentation.words import IsFree, parts

Change = Callable[[Sequence[str], Any, int, Draws], list[str]]
Synonyms = Callable[[str], Sequence[str]]

MARKS = (".", ";", "?", ":", "!", ",")  # AEDA's
CHINESE_MARKS = ("。", "；", "？", "：", "！", "，")
_SHORTEST = 4  # letters of a word that can bear a slip: of a shorter one it may make another word
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def changes(rate: float, length: int) -> int:
    """How many of `length` words a rate changes: rate · length rounded down, at least one (EDA, §2)."""
    return max(1, int(rate * length)) if rate > 0 and length else 0


# --- words -----------------------------------------------------------------------------------------------------------


def swap_words(words: Sequence[str], free: IsFree, count: int, draws: Draws) -> list[str]:
    """Exchange the words of `count` pairs, no word twice; punctuation and white space stay where they are."""
    changed = list(words)
    chosen = draws.positions(changed, free, 2 * count)
    for first, second in zip(chosen[::2], chosen[1::2], strict=False):  # an odd one out stays
        if not _exchange(changed, first, second):  # the same word twice: any other one
            for another in draws.positions(changed, _other_than(changed[first], free), 1):
                _exchange(changed, first, another)
    return changed


def _other_than(word: str, free: IsFree) -> IsFree:
    core = parts(word)[1]
    return lambda other: free(other) and parts(other)[1] != core


def _exchange(words: list[str], first: int, second: int) -> bool:
    """Whether they differ."""
    one, other = parts(words[first]), parts(words[second])
    words[first], words[second] = one[0] + other[1] + one[2], other[0] + one[1] + other[2]
    return one[1] != other[1]


def delete_words(words: Sequence[str], free: IsFree, count: int, draws: Draws) -> list[str]:
    """Leave out `count` words, but never the last one that is free; their punctuation stays.

    EDA draws for each word whether it goes, with probability rate; here the number is fixed: rate · length.
    """
    changed = list(words)
    for position in sorted(draws.positions(words, free, count + 1)[1:], reverse=True):  # the first one drawn stays
        _remove(changed, position)
    return changed


def _remove(words: list[str], position: int) -> None:
    before, _, after = parts(words[position])
    del words[position]
    if position == len(words):  # it was the last: what ends the text ends it still
        words[-1] = words[-1].rstrip() + (f" {before}" if before.strip() else "") + after
        return
    words[position] = before + words[position]
    if position and after.strip():
        words[position - 1] = words[position - 1].rstrip() + after


def replace_with_synonyms(words: Sequence[str], choices: Synonyms, count: int, draws: Draws) -> list[str]:
    """Put one of its `choices`, see `with_synonyms`, in the place of `count` words that have any."""
    changed = list(words)
    for position in _positions(words, choices, count, draws):
        before, _, after = parts(words[position])
        changed[position] = before + draws.one(choices(words[position])) + after
    return changed


def insert_synonyms(words: Sequence[str], choices: Synonyms, count: int, draws: Draws) -> list[str]:
    """Put a synonym of one of the words before any word, `count` times; `choices` as in `replace_with_synonyms`."""
    changed = list(words)
    for position in _positions(words, choices, count, draws):
        changed.insert(draws.below(len(changed)), draws.one(choices(words[position])) + " ")
    return changed


def _positions(words: Sequence[str], choices: Synonyms, count: int, draws: Draws) -> list[int]:
    """Few words have a synonym: to look at all of them is quicker than `draws.positions`, which tries some."""
    return draws.some(list(compress(range(len(words)), map(choices, words))), count)


def with_synonyms(free: IsFree, synonyms: Synonyms) -> Synonyms:
    """The synonyms of free words, none of others; remembers what it was asked."""
    return lru_cache(None)(lambda word: synonyms(parts(word)[1]) if free(word) else ())


def insert_punctuation(
    words: Sequence[str], free: IsFree, count: int, draws: Draws, marks: Sequence[str] = MARKS, space: str = " "
) -> list[str]:
    """AEDA: put from 1 to `count` marks before words, each number as likely; no word is changed."""
    changed = list(words)
    number = 1 + draws.below(count) if count else 0
    for position in sorted(draws.positions(words, bool, number), reverse=True):
        changed.insert(position, draws.one(marks) + space)
    return changed


# --- characters ------------------------------------------------------------------------------------------------------


def slip_letters(words: Sequence[str], free: IsFree, count: int, draws: Draws) -> list[str]:
    """In `count` words of four letters or more: two neighbours exchanged, a letter left out, or one written twice.

    The first letter stays: readers and typists rarely miss it (Pruthi et al. 2019, arXiv:1905.11268).
    """
    return _change_letters(words, free, count, draws, _slip)


def _change_letters(
    words: Sequence[str], free: IsFree, count: int, draws: Draws, change: Callable[[str, Draws], str]
) -> list[str]:
    changed = list(words)
    for position in draws.positions(words, lambda word: free(word) and len(parts(word)[1]) >= _SHORTEST, count):
        before, core, after = parts(changed[position])
        changed[position] = before + change(core, draws) + after
    return changed


def _slip(core: str, draws: Draws) -> str:
    kind, place = draws.below(3), 1 + draws.below(len(core) - 2)  # the last letter moves only in an exchange
    if kind == 0 and core[place] != core[place + 1]:
        return core[:place] + core[place + 1] + core[place] + core[place + 2 :]
    return core[:place] + core[place + 1 :] if kind == 1 else core[:place] + core[place] + core[place:]


def press_neighbours(words: Sequence[str], free: IsFree, count: int, draws: Draws) -> list[str]:
    """In `count` words of four letters or more: one letter becomes a neighbour of it on a QWERTY keyboard."""
    return _change_letters(words, free, count, draws, _press)


def _press(core: str, draws: Draws) -> str:
    places = [place for place in range(1, len(core)) if core[place].lower() in NEIGHBOURS]
    if not places:
        return core
    place = draws.one(places)
    letter = draws.one(NEIGHBOURS[core[place].lower()])
    return core[:place] + (letter.upper() if core[place].isupper() else letter) + core[place + 1 :]


def _neighbours() -> dict[str, str]:
    """The keys beside a key, and those that touch it above and below: each row lies half a key to the right."""
    touching: dict[str, str] = {}
    for row, keys in enumerate(_ROWS):
        for place, key in enumerate(keys):
            near = [(row, place - 1), (row, place + 1)]
            near += [(row - 1, place), (row - 1, place + 1), (row + 1, place - 1), (row + 1, place)]
            touching[key] = "".join(_ROWS[r][p] for r, p in near if 0 <= r < len(_ROWS) and 0 <= p < len(_ROWS[r]))
    return touching


NEIGHBOURS: Mapping[str, str] = _neighbours()


def slip_characters(words: Sequence[str], free: IsFree, count: int, draws: Draws) -> list[str]:
    """Chinese, `words` being characters: `count` of them change places with the next, are left out, or come twice."""
    changed = list(words)
    for position in draws.positions(words, free, count + 1)[1:]:  # one stays in any case
        kind, after = draws.below(3), position + 1
        if kind == 0 and after < len(words) and free(changed[after]) and changed[position] != changed[after]:
            changed[position], changed[after] = changed[after], changed[position]
        else:
            changed[position] *= 0 if kind == 1 else 2
    return changed
