"""report.json's dict → one HTML file that needs nothing else: styles, charts and plotly.js are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from moss_rlhf.files import write_text
from moss_rlhf.reporting import charts, facts, search, sensitivity, summary, table, wording

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
        title=f"{_model_in_words(report['recipe']['model'])} · {wording.name_in_words(report['task'])}",
        summary=summary,
        tiles=_tiles(report),
        rows=table.rows(report),
        stage_metric=summary.stage_metric(report),
        speed_charts=_speed_charts(table.columns(report)),
        histories=_histories(report),
        sensitivities=_sensitivities(report),
        calibration=_calibration(report),
        confusions=_confusions(report),
        findings=_findings(report),
        cleaning_effect=_cleaning_effect(report),
        collected=_collected(report),
        search=search,
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
        plotly_script=charts.plotly_script(),
    )
    return text


def _model_in_words(model: str | Mapping[str, Any]) -> str:
    return Path(model).name if isinstance(model, str) else f"{model['config']['model_type']} from scratch"


def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("moss_rlhf.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(in_words=wording.name_in_words, duration=wording.duration)
    environment.filters.update(count=wording.count, flops=wording.flops, size=wording.size, estimate=wording.estimate)
    environment.filters.update(shown=facts.show, stage_facts=facts.stage_facts, plain=_plain)
    environment.filters.update(percent=wording.percent, score=wording.score)
    return environment.get_template("page.html")


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
        return Tile(wording.title_in_words(name), wording.estimate(reached), "nothing to compare with", "unknown")
    change = report["gain"]["metric"]
    before = report["before"]["metrics"].get(name) or {}
    value = f"{wording.score(before.get('value'))} → {wording.score((reached or {}).get('value'))}"
    detail = wording.change_in_words(change, summary.confidence(report))
    return Tile(wording.title_in_words(name), value, detail, wording.mark_of_metric(change))


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


@dataclass(frozen=True)
class Sensitivity:
    """What a sensitivity stage measured: the heat map, and the same numbers to read."""

    number: int
    chart: str
    rows: int
    columns: list[str]
    cells: dict[str, list[float | None]]
    influences: dict[str, float]


def _sensitivities(report: Report) -> list[Sensitivity]:
    return [_sensitivity(number, found) for number, found in sensitivity.tables(report)]


def _sensitivity(number: int, found: Mapping[str, Any]) -> Sensitivity:
    groups, influences = sensitivity.groups(found), sensitivity.influences(found)
    chart = charts.sensitivity_chart(number, groups, influences)
    columns = sensitivity.columns(found)
    cells = {name: [values[index] for values in columns.values()] for index, name in enumerate(influences)}
    return Sensitivity(number, chart, found["rows"], list(columns), cells, influences)


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


@dataclass(frozen=True)
class Calibration:
    """The shipped temperature, what it changed, and the reliability diagram."""

    temperature: float
    rows: int
    chart: str
    metrics: dict[str, dict[str, str]]


def _calibration(report: Report) -> Calibration | None:
    found = report.get("calibration")
    if not found:
        return None
    lines = {
        "before": found.get("reliability_before"),
        "after": found["reliability"],
        "after, scaled": found["reliability_scaled"],
    }
    chart = charts.reliability_chart({name: bins for name, bins in lines.items() if bins})
    metrics = {name: _scaling(report, name, scaled) for name, scaled in found["metrics"].items()}
    return Calibration(found["temperature"], found["rows"], chart, metrics)


def _scaling(report: Report, name: str, scaled: Mapping[str, Any]) -> dict[str, str]:
    sides = {side: ((report[side] or {}).get("metrics") or {}).get(name) for side in ("before", "after")}
    return {side: wording.estimate(value) for side, value in {**sides, "after, scaled": scaled}.items()}


def _confusions(report: Report) -> dict[str, list[list[dict[str, Any]]]]:
    """{"before": rows of cells, "after": …}; a cell has its count and its share of the row's true label."""
    found = report.get("confusion") or {}
    matrices = {side: found.get(side) for side in ("before", "after")}
    return {side: [_shares(row) for row in matrix] for side, matrix in matrices.items() if matrix}


# --- what was collected, what cleaning found --------------------------------------------------------------------------


_EXAMPLES = 5


def _collected(report: Report) -> list[dict[str, Any]]:
    """One entry a split that was chosen from: how many of how many, by what, the first few."""
    chosen = {split: facts["collected"] for split, facts in report["data"].items() if facts.get("collected")}
    return [found | {"split": split, "examples": found["examples"][:_EXAMPLES]} for split, found in chosen.items()]


def _findings(report: Report) -> list[dict[str, Any]]:
    """One entry a check and split: how many rows, what was done with them, the first few."""
    return [
        {
            "check": wording.name_in_words(check),
            "split": split,
            "count": found["count"],
            "done": ", ".join(f"{wording.count(rows)} {_DONE[action]}" for action, rows in found["actions"].items()),
            "examples": found["examples"][:_EXAMPLES],
        }
        for split, facts in report["data"].items()
        for check, found in (facts.get("findings") or {}).items()
    ]


_DONE = {"drop": "dropped", "flag": "listed only", "mend": "mended"}


def _cleaning_effect(report: Report) -> str:
    """A sentence on what cleaning did to a cheap classifier on validation, where that was measured."""
    effect = (report["data"].get("train") or {}).get("cleaning_effect")
    if not effect:
        return ""
    change = f"{wording.signed(effect['delta'])} ({wording.signed(effect['low'])} to {wording.signed(effect['high'])})"
    cleaned, raw = (wording.score(effect[name]) for name in ("cleaned_accuracy", "raw_accuracy"))
    return (
        f"A logistic regression on embeddings reaches an accuracy of {cleaned} on validation when trained on the "
        f"cleaned rows, {raw} on the raw ones: {change}."
    )


def _shares(row: Sequence[int]) -> list[dict[str, Any]]:
    total = sum(row) or 1
    return [{"count": number, "share": number / total} for number in row]
