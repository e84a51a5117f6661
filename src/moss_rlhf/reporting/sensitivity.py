"""The table that a sensitivity stage measured, as columns: loss by block and way of compressing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


def groups(table: Scores) -> dict[str, dict[str, list[float | None]]]:
    """{way of compressing: {what is done: the loss it would cost every block}}; None where a block has no such part.

    Dropping a block is scored in another unit, its influence 1 − cos; see `influences`.
    """
    blocks = list(table["blocks"].values())
    return {
        "prune": {f"prune {float(level):.0%}": _column(blocks, "prune", level) for level in blocks[0]["prune"]},
        "round": {f"{bits} bits": _column(blocks, "bits", bits) for bits in blocks[0]["bits"]},
        "narrow": {
            title: [_half(scores.get(part)) for scores in blocks]
            for part, title in _HALVED.items()
            if any(part in scores for scores in blocks)
        },
    }


def _column(blocks: Sequence[Scores], kind: str, level: str) -> list[float | None]:
    return [float(scores[kind][level]) for scores in blocks]


def columns(table: Scores) -> dict[str, list[float | None]]:
    """All columns of all groups."""
    return {name: values for group in groups(table).values() for name, values in group.items()}


def _half(units: Sequence[float] | None) -> float | None:
    """The cheaper half, rounded down, of the units' scores together."""
    return None if units is None else float(sum(sorted(units)[: len(units) // 2]))


def influences(table: Scores) -> dict[str, float]:
    """{block: 1 − cos(input, output)}: how much the block changes what goes through it, 0 to 2."""
    return {name: float(scores["drop"]) for name, scores in table["blocks"].items()}


_BRIEF = ("prune 50%", "4 bits", "half the heads", "half the neurons")


def text_lines(table: Scores) -> list[str]:
    """The table in a few columns of plain text, a line a block, for a terminal."""
    found, drops = columns(table), influences(table)
    chosen = {title: found[title] for title in _BRIEF if title in found}
    width = max(len("loss by"), *map(len, drops))
    lines = ["  ".join([f"{'loss by':<{width}}", *(f"{title:>16}" for title in chosen), f"{'influence':>9}"])]
    for index, (name, drop) in enumerate(drops.items()):
        cells = [f"{_cell(values[index]):>16}" for values in chosen.values()]
        lines.append("  ".join([f"{name:<{width}}", *cells, f"{drop:>9.3f}"]))
    return lines


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"
