"""report.json's dict → one HTML file that needs nothing else: styles, charts and plotly.js are inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from moss_rlhf.files import write_text
from moss_rlhf.reporting import charts, search, summary, table, wording

Report = Mapping[str, Any]
Measurement = Mapping[str, Any]


@dataclass(frozen=True)
class Tile:
    """One headline number: what it is, the number, what it means, and whether that is good."""

    title: str
    value: str
    detail: str
    mark: wording.Mark


def write_page(report: Report, place: Path) -> None:
    """Render the dict of report.json into one HTML file at `place`, whole or not at all."""
    write_text(place, render_page(report))


def render_page(report: Report) -> str:
    """The page as text. Texts and names of the report are escaped; equal reports give equal pages."""
    text: str = _template().render(
        report=report,
        title=f"{Path(report['recipe']['model']).name} · {wording.name_in_words(report['task'])}",
        summary=summary,
        tiles=_tiles(report),
        rows=table.rows(report),
        main_metric=summary.main_metric(report),
        speed_charts=_speed_charts(table.columns(report)),
        histories=_histories(report),
        confusions=_confusions(report),
        search=search,
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
        plotly_script=charts.plotly_script(),
    )
    return text


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("moss_rlhf.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(in_words=wording.name_in_words, fact=fact_in_words, duration=wording.duration)
    environment.filters.update(count=wording.count, flops=wording.flops, size=wording.size, estimate=wording.estimate)
    environment.filters.update(percent=wording.percent, score=wording.score)
    return environment.get_template("page.html")


def fact_in_words(value: object, name: object = "") -> str:
    """Any JSON value on one line; names that end in bytes, seconds, flops or share give the unit."""
    if isinstance(value, Mapping):
        return ", ".join(f"{wording.name_in_words(key)} {fact_in_words(item, key)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(
            f"[{fact_in_words(item)}]" if isinstance(item, list) else fact_in_words(item) for item in value
        )
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: wording.NOT_MEASURED}[value]
    return _number_in_words(value, str(name)) if isinstance(value, int | float) else str(value)


_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": wording.size,
    "seconds": wording.duration,
    "flops": wording.flops,
    "share": wording.percent,
}


def _number_in_words(value: float, name: str) -> str:
    for ending, words in _UNITS.items():
        if name.endswith(ending):
            return words(value)
    return wording.count(value) if isinstance(value, int) else wording.significant(value)


# --- headline numbers ------------------------------------------------------------------------------------------------


def _tiles(report: Report) -> list[Tile]:
    gain = report["gain"] or {"speedup": {}, "latency": {}, "size": None}
    speed, latency = summary.speed_ratios(gain)
    return [
        _metric_tile(report),
        _ratio_tile("Speed", speed, ("faster", "slower", "as fast"), summary.speed_in_words(report)),
        _ratio_tile("Latency", latency, ("lower", "higher", "the same"), summary.latency_in_words(report)),
        _ratio_tile("Size", gain["size"], ("smaller", "larger", "the same"), summary.size_in_words(report)),
        _cost_tile(report),
    ]


def _metric_tile(report: Report) -> Tile:
    name = summary.main_metric(report) or "metric"
    reached = report["after"]["metrics"].get(name)
    if report["gain"] is None:
        return Tile(
            wording.name_in_words(name).capitalize(), wording.estimate(reached), "nothing to compare with", "unknown"
        )
    change = report["gain"]["metric"]
    before = report["before"]["metrics"].get(name) or {}
    value = f"{wording.score(before.get('value'))} → {wording.score((reached or {}).get('value'))}"
    detail = wording.change_in_words(change, summary.confidence(report))
    return Tile(wording.name_in_words(name).capitalize(), value, detail, wording.mark_of_metric(change))


def _ratio_tile(title: str, ratio: float | None, words: tuple[str, str, str], detail: str) -> Tile:
    if ratio is None:
        return Tile(title, detail, "nothing to compare with", "unknown")
    return Tile(title, wording.ratio_in_words(ratio, *words), detail, wording.mark_of_ratio(ratio))


def _cost_tile(report: Report) -> Tile:
    spent, _, compared = summary.cost_in_words(report).partition(", ")
    return Tile("Cost of making it", spent, compared, "unknown")


# --- pictures --------------------------------------------------------------------------------------------------------


def _speed_charts(columns: Mapping[str, Measurement]) -> dict[str, str]:
    drawn = {
        "Throughput: taller is better": charts.throughput_chart(columns),
        "Latency: shorter is better": charts.latency_chart(columns),
    }
    return {title: chart for title, chart in drawn.items() if chart}


def _histories(report: Report) -> dict[str, str]:
    metrics = list(report["after"]["metrics"])
    return {
        f"Stage {number}: {stage['kind']}": charts.history_chart(number, stage["history"], metrics)
        for number, stage in enumerate(report["stages"], start=1)
        if stage.get("history")
    }


def _confusions(report: Report) -> dict[str, list[list[dict[str, Any]]]]:
    """{"before": rows of cells, "after": …}; a cell has its count and its share of the row's true label."""
    found = report.get("confusion") or {}
    matrices = {side: found.get(side) for side in ("before", "after")}
    return {side: [_shares(row) for row in matrix] for side, matrix in matrices.items() if matrix}


def _shares(row: Sequence[int]) -> list[dict[str, Any]]:
    total = sum(row) or 1
    return [{"count": number, "share": number / total} for number in row]
