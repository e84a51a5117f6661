"""The table that a sensitivity stage measured, as columns: loss by block and way of compressing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Scores = Mapping[str, Any]

_HALVED = {"heads": "half the heads", "cross_heads": "half the cross heads", "feed_forward": "half the neurons"}


def tables(report: Report) -> Iterator[tuple[int, Scores]]:
    """(number of the stage, its table), of every stage that measured one."""
    for number, stage in enumerate(report["stages"], start=1):
        table = (stage.get("facts") or {}).get("table")
        if stage["kind"] == "sensitivity" and isinstance(table, Mapping) and table.get("blocks"):
            yield number, table


def columns(table: Scores) -> dict[str, Callable[[Scores], float | None]]:
    """What could be done to a block, and the loss it would cost by the block's scores; None where it has no such part.

    Dropping a block is scored in another unit, its influence 1 − cos; see `influences`.
    """
    first = next(iter(table["blocks"].values()))
    found: dict[str, Callable[[Scores], float | None]] = {}
    for sparsity in first["prune"]:
        found[f"prune {float(sparsity):.0%}"] = lambda scores, level=sparsity: scores["prune"][level]  # type: ignore[misc]
    for bits in first["bits"]:
        found[f"{bits} bits"] = lambda scores, level=bits: scores["bits"][level]  # type: ignore[misc]
    for part, title in _HALVED.items():
        if any(part in scores for scores in table["blocks"].values()):
            found[title] = lambda scores, kind=part: _half(scores.get(kind))  # type: ignore[misc]
    return found


def _half(units: Sequence[float] | None) -> float | None:
    """The cheaper half, rounded down, of the units' scores together."""
    return None if units is None else float(sum(sorted(units)[: len(units) // 2]))


def damages(table: Scores) -> dict[str, list[float | None]]:
    """{block: the loss of each of `columns`}."""
    makers = columns(table).values()
    return {name: [make(scores) for make in makers] for name, scores in table["blocks"].items()}


def influences(table: Scores) -> dict[str, float]:
    """{block: 1 − cos(input, output)}: how much the block changes what goes through it, 0 to 2."""
    return {name: float(scores["drop"]) for name, scores in table["blocks"].items()}


_BRIEF = ("prune 50%", "4 bits", "half the heads", "half the neurons")


def text_lines(table: Scores) -> list[str]:
    """The table in a few columns of plain text, a line a block, for a terminal."""
    titles, found, drops = list(columns(table)), damages(table), influences(table)
    chosen = [(title, titles.index(title)) for title in _BRIEF if title in titles]
    width = max(len("loss by"), *(len(name) for name in found))
    lines = ["  ".join([f"{'loss by':<{width}}", *(f"{title:>16}" for title, _ in chosen), f"{'influence':>9}"])]
    for name, values in found.items():
        cells = [f"{_cell(values[index]):>16}" for _, index in chosen]
        lines.append("  ".join([f"{name:<{width}}", *cells, f"{drops[name]:>9.3f}"]))
    return lines


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
