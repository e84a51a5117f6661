"""Any stage's facts as something that can be shown: nested, bounded, with what matters first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moss_rlhf.reporting import wording

DEEPEST = 4  # mappings inside mappings; what lies deeper is written on one line
MOST = 60  # entries of one mapping or list
_SHORT_LIST = 6
_LONGEST = 400  # characters of one text
_FIRST = ("removed", "measured", "faster_here")
_TITLES = {"faster_here": "faster here?"}
_ELSEWHERE = {"table"}  # a table of sensitivity is drawn

_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": wording.size,
    "seconds": wording.duration,
    "flops": wording.flops,
    "share": wording.percent,
}


@dataclass(frozen=True)
class Shown:
    """One value, ready for the page.

    kind     text; pairs (`names` and `parts`); items (`parts`); rows: a table (`names` are its columns, `cells`).
    count    how many entries there are, of which `left` are not shown.
    """

    kind: Literal["text", "pairs", "items", "rows"]
    text: str = ""
    names: tuple[str, ...] = ()
    parts: tuple[Shown, ...] = ()
    cells: tuple[tuple[str, ...], ...] = ()
    count: int = 0
    left: int = 0


def show(value: object, name: object = "", depth: int = 0) -> Shown:
    """What to draw for any JSON value; nothing is too deep or too long for it."""
    if isinstance(value, Mapping) and value and depth < DEEPEST:
        if _is_table(list(value.values())):
            return _table([{"": key, **row} for key, row in value.items()])
        return _pairs(value, depth)
    if isinstance(value, Sequence) and not isinstance(value, str) and value and depth < DEEPEST:
        rows = list(value)
        if len(rows) == 1 and isinstance(rows[0], Mapping):
            return show(rows[0], name, depth)
        return _table(rows) if _is_table(rows) else _items(rows, name, depth)
    return Shown("text", _shortened(in_words(value, name)) or "none")


def stage_facts(facts: Mapping[str, Any]) -> Shown:
    """A stage's facts: what it removed, what it measured and whether it will be faster come first."""
    ordered = {name: facts[name] for name in _FIRST if name in facts}
    rest = {name: value for name, value in facts.items() if name not in ordered and not _is_drawn(name, value)}
    return show({**ordered, **rest})


def _is_drawn(name: str, value: object) -> bool:
    return name in _ELSEWHERE and isinstance(value, Mapping) and "blocks" in value


def _pairs(value: Mapping[Any, Any], depth: int) -> Shown:
    chosen = list(value.items())[:MOST]
    names = tuple(_TITLES.get(str(key), wording.name_in_words(key)) for key, _ in chosen)
    parts = tuple(show(item, key, depth + 1) for key, item in chosen)
    return Shown("pairs", names=names, parts=parts, count=len(value), left=len(value) - len(chosen))


def _items(values: Sequence[Any], name: object, depth: int) -> Shown:
    plain = not any(isinstance(item, Mapping) for item in values)
    if plain and len(values) <= _SHORT_LIST:
        return Shown("text", _shortened(in_words(values, name)))
    parts = tuple(
        Shown("text", _shortened(in_words(item, name))) if plain else show(item, name, depth + 1)
        for item in values[:MOST]
    )
    return Shown("items", parts=parts, count=len(values), left=len(values) - len(parts))


def _is_table(rows: Sequence[Any]) -> bool:
    """Several mappings with the same keys and no further nesting but short lists."""
    if len(rows) < 2 or not all(isinstance(row, Mapping) and row for row in rows):
        return False
    return len({tuple(row) for row in rows}) == 1 and not any(_is_deep(cell) for row in rows for cell in row.values())


def _is_deep(value: object) -> bool:
    if isinstance(value, Mapping):
        return True
    if isinstance(value, Sequence) and not isinstance(value, str):
        return len(value) > _SHORT_LIST or any(isinstance(item, Mapping | list) for item in value)
    return False


def _table(rows: Sequence[Mapping[str, Any]]) -> Shown:
    names = tuple(wording.name_in_words(key) for key in rows[0])
    cells = tuple(tuple(_shortened(in_words(cell, key)) for key, cell in row.items()) for row in rows[:MOST])
    return Shown("rows", names=names, cells=cells, count=len(rows), left=len(rows) - len(cells))


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def in_words(value: object, name: object = "") -> str:
    """Any JSON value on one line; names that end in bytes, seconds, flops or share give the unit."""
    if isinstance(value, Mapping):
        return ", ".join(f"{wording.name_in_words(key)} {in_words(item, key)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(f"[{in_words(item)}]" if isinstance(item, list) else in_words(item, name) for item in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: wording.NOT_MEASURED}[value]
    return _number_in_words(value, str(name)) if isinstance(value, int | float) else str(value)


def _number_in_words(value: float, name: str) -> str:
    for ending, words in _UNITS.items():
        if name.endswith(ending):
            return words(value)
    return wording.count(value) if isinstance(value, int) else wording.significant(value)
