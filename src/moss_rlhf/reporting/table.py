"""The before/after table: one row a quantity, every measured model a column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moss_rlhf.reporting import wording

Report = Mapping[str, Any]
Measurement = Mapping[str, Any]

REFERENCE = "same shape, float32"


@dataclass(frozen=True)
class Row:
    """`cells` by column name: before, after, change, and the reference; absent where the report has none."""

    title: str
    cells: dict[str, str]


def columns(report: Report) -> dict[str, Measurement]:
    """The measurements that the report has, by the name people see, in the order of making."""
    named = {"before": report["before"], REFERENCE: report.get("reference"), "after": report["after"]}
    return {name: measurement for name, measurement in named.items() if measurement is not None}


def rows(report: Report) -> list[Row]:
    """Every quantity of the report's measurements, as text."""
    makers = (_metric_rows, _plain_rows, _latency_rows, _throughput_rows)
    return [row for maker in makers for row in maker(report, columns(report))]


def _metric_rows(report: Report, sides: Mapping[str, Measurement]) -> Iterator[Row]:
    judged = (report["gain"] or {}).get("metric") or {"name": None}
    for name in dict.fromkeys(name for side in sides.values() for name in side["metrics"]):
        cells = {column: wording.estimate(side["metrics"].get(name)) for column, side in sides.items()}
        change = wording.signed(judged["delta"]) if judged["name"] == name else ""
        yield _row(wording.title_in_words(name), cells, change)


def _plain_rows(_: Report, sides: Mapping[str, Measurement]) -> Iterator[Row]:
    for title, field, words in (*_TEXTS, *_AMOUNTS):
        cells = {column: words(side.get(field)) for column, side in sides.items()}
        yield _row(title, cells, _less_or_more(sides, field) if (title, field, words) in _AMOUNTS else "")


def _text(value: object) -> str:
    return wording.NOT_MEASURED if value is None else str(value)


_TEXTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("What was measured", "artifact", _text),
    ("Runtime", "runtime", _text),
    ("Split", "split", _text),
    ("Rows measured", "rows", wording.count),
)
_AMOUNTS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Parameters", "parameters", wording.count),
    ("Parameters that are not zero", "nonzero", wording.count),
    ("Multiplications per token", "macs_per_token", wording.count),
    ("Weight files", "bytes", wording.size),
    ("Peak memory", "peak_memory_bytes", wording.size),
)


def _less_or_more(sides: Mapping[str, Measurement], field: str) -> str:
    before, after = (sides.get(column, {}).get(field) for column in ("before", "after"))
    return wording.ratio_in_words(before / after, "less", "more", "the same") if before and after else ""


def _latency_rows(report: Report, sides: Mapping[str, Measurement]) -> Iterator[Row]:
    for batch in _batches(sides.values(), "latency_ms"):
        found = {column: (side.get("latency_ms") or {}).get(batch) or {} for column, side in sides.items()}
        for percentile, name in (("p50", "median"), ("p95", "p95")):
            cells = {column: wording.milliseconds(values.get(percentile)) for column, values in found.items()}
            change = _faster_or_slower(report, "latency", batch) if percentile == "p50" else ""
            yield _row(f"Latency, batch of {batch}, {name}", cells, change)


def _throughput_rows(report: Report, sides: Mapping[str, Measurement]) -> Iterator[Row]:
    for batch in _batches(sides.values(), "throughput"):
        cells = {column: wording.rate((side.get("throughput") or {}).get(batch)) for column, side in sides.items()}
        yield _row(f"Texts per second, batch of {batch}", cells, _faster_or_slower(report, "speedup", batch))


def _batches(sides: Iterable[Measurement], field: str) -> list[str]:
    return sorted({batch for side in sides for batch in side.get(field) or {}}, key=int)


def _faster_or_slower(report: Report, field: str, batch: str) -> str:
    ratio = (report["gain"] or {}).get(field, {}).get(batch)
    return "" if ratio is None else wording.ratio_in_words(ratio, "faster", "slower", "the same")


def _row(title: str, cells: Mapping[str, str], change: str) -> Row:
    """The reference comes last, so that a narrow screen shows before, after and change."""
    texts = {**cells, "change": change} if "before" in cells else cells
    return Row(title, {name: texts[name] for name in ("before", "after", "change", REFERENCE) if name in texts})
