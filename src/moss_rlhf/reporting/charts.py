"""Charts as HTML fragments: they need the plotly.js that the page holds once, and take text colours from its style."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moss_rlhf.reporting import wording

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Measurement = Mapping[str, Any]
Point = Mapping[str, Any]

# Okabe and Ito's palette: told apart with any colour vision, and on white as on black.
_COLOURS = ("#8b8f96", "#e69f00", "#2f8fd3", "#009e73", "#cc79a7")
_SIDES = {"before": _COLOURS[0], "after": _COLOURS[2]}
_HEAT = ((0.0, "#f2e9d8"), (0.35, "#f0b95c"), (0.65, "#d4611f"), (1.0, "#5e1224"))  # lightness alone tells the order
_COLD = ((0.0, "#e6eef5"), (1.0, "#1b5a8a"))
_DECADES = 20  # from this ratio on, settings are seen on a logarithmic axis only
_GRID = "rgba(128, 128, 128, 0.25)"


def plotly_script() -> str:
    """The source of plotly.js, to stand once in a page."""
    import plotly.offline

    return str(plotly.offline.get_plotlyjs())


def throughput_chart(measurements: Mapping[str, Measurement]) -> str:
    """Bars of texts per second, a panel a batch size; `measurements` by the name people see. Empty if none was made."""
    return _batch_chart("throughput", measurements, "texts per second", lambda value: value)


def latency_chart(measurements: Mapping[str, Measurement]) -> str:
    """Bars of the median milliseconds a batch takes, a panel a batch size. Empty if none was made."""
    return _batch_chart("latency_ms", measurements, "milliseconds", lambda value: value["p50"])


def _batch_chart(
    field: str, measurements: Mapping[str, Measurement], unit: str, number: Callable[[Any], float | None]
) -> str:
    values = {name: measurement.get(field) or {} for name, measurement in measurements.items()}
    batches = sorted({batch for value in values.values() for batch in value}, key=int)
    if not batches:
        return ""
    figure = _panels(columns=len(batches), titles=[f"batch of {batch}" for batch in batches])
    for column, batch in enumerate(batches, start=1):
        heights = {name: number(value[batch]) for name, value in values.items() if batch in value}
        _add_bars(figure, column, heights, unit)
    figure.update_yaxes(title_text=unit, col=1)
    figure.update_xaxes(showticklabels=False, showgrid=False)
    return _html(figure, f"chart-{field}", height=300)


def _add_bars(figure: Figure, column: int, heights: Mapping[str, float | None], unit: str) -> None:
    for name, height in heights.items():
        text = wording.significant(height) if height is not None else ""
        bar = {"x": [name], "y": [height], "text": [text], "name": name, "legendgroup": name, "showlegend": column == 1}
        look = {"marker_color": _SIDES.get(name, _COLOURS[1]), "textposition": "outside", "cliponaxis": False}
        figure.add_bar(**bar, **look, hovertemplate=f"{name}: %{{text}} {unit}<extra></extra>", row=1, col=column)
    top = max((height for height in heights.values() if height is not None), default=1)
    figure.update_yaxes(range=[0, 1.18 * top], row=1, col=column)


def history_chart(number: int, history: Mapping[str, Sequence[Point]], metrics: Sequence[str]) -> str:
    """One fine-tuning stage by step: loss, the metrics that were evaluated, the learning rate."""
    train, validation = history["train"], history["validation"]
    shown = [metric for metric in metrics if any(point.get(metric) is not None for point in validation)]
    figure = _panels(rows=3 if shown else 2, heights=[0.45, 0.32, 0.23] if shown else [0.7, 0.3])
    _add_line(figure, 1, train, field="loss", name="loss, training", colour=_COLOURS[0])
    _add_line(figure, 1, validation, field="loss", name="loss, validation", colour=_COLOURS[1])
    for index, metric in enumerate(shown):
        _add_line(
            figure,
            2,
            validation,
            field=metric,
            name=f"{wording.name_in_words(metric)}, validation",
            colour=_COLOURS[2 + index % 3],
        )
    last = 3 if shown else 2
    _add_line(figure, last, train, field="learning_rate", name="learning rate", colour=_COLOURS[0])
    _name_axes(figure, ["loss", "metric", "rate"] if shown else ["loss", "rate"])
    return _html(figure, f"chart-history-{number}", height=470)


def sensitivity_chart(
    number: int, groups: Mapping[str, Mapping[str, Sequence[float | None]]], influences: Mapping[str, float]
) -> str:
    """A heat map, blocks × ways of compressing: the loss that each would cost, in colours by its logarithm.

    groups       {group: {column: the damage of every block, the first in the network first}}; a gap stands between
                 groups. None: no such part; what costs nothing is as pale as the least on the scale.
    influences   by the blocks' names, what dropping one would change; in another unit, so in colours of its own.
    """
    names, values = _with_gaps(groups, len(influences))
    costs = [value for column in values for value in column if value is not None and value > 0]
    low, high = _decades(costs)
    ticks = range(low, high + 1, max(1, -(-(high - low) // 3)))  # four at most: a chart of few blocks is low
    figure = _panels()
    rows = list(zip(*values, strict=True))
    losses = {
        "z": [[None if value is None else _logarithm(value, low) for value in row] for row in rows],
        "customdata": [["–" if value is None else f"{value:.3g}" for value in row] for row in rows],
        "text": [names] * len(influences),
        "hovertemplate": "%{y}, %{text}: loss + %{customdata}<extra></extra>",
        "colorbar": {
            "title": {"text": "loss", "side": "top"},
            "tickvals": list(ticks),
            "ticktext": [f"10<sup>{power}</sup>" for power in ticks],
            "thickness": 12,
        },
    }
    blocks, gap = list(influences), {"xgap": 2, "ygap": 2}
    figure.add_heatmap(x=list(range(len(names))), y=blocks, **losses, colorscale=_HEAT, zmin=low, zmax=high, **gap)
    drops = {"z": [[value] for value in influences.values()], "hovertemplate": "%{y}, drop: %{z:.3f}<extra></extra>"}
    top = max(influences.values(), default=1.0) or 1.0
    figure.add_heatmap(
        x=[len(names) + 1], y=blocks, **drops, colorscale=_COLD, zmin=0, zmax=top, showscale=False, **gap
    )
    titles = {index: name for index, name in enumerate(names) if name} | {len(names) + 1: "drop (influence)"}
    figure.update_xaxes(tickvals=list(titles), ticktext=list(titles.values()), side="top", tickangle=-45, ticks="")
    figure.update_yaxes(autorange="reversed", type="category")
    return _html(figure, f"chart-sensitivity-{number}", height=170 + 26 * len(blocks), top=120, grid=False)


def _with_gaps(
    groups: Mapping[str, Mapping[str, Sequence[float | None]]], blocks: int
) -> tuple[list[str], list[Sequence[float | None]]]:
    """Names and columns of all groups, an empty column between two."""
    names: list[str] = []
    values: list[Sequence[float | None]] = []
    for columns in groups.values():
        if names:
            names.append("")
            values.append([None] * blocks)
        names += columns.keys()
        values += columns.values()
    return names, values


def _decades(costs: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten around the costs, no more than 6 below the highest."""
    if not costs:
        return -1, 0
    high = math.ceil(math.log10(max(costs)))
    return max(math.floor(math.log10(min(costs))), high - 6) if min(costs) < 10**high else high - 1, high


def _logarithm(value: float, low: int) -> float:
    return max(math.log10(value), low) if value > 0 else float(low)


def reliability_chart(lines: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Share of right answers against confidence, a line a model; on the diagonal confidence is what it says.

    lines   by the name people see, its bins: {"rows", "confidence", "accuracy"}; the larger a dot, the more rows.
    """
    figure = _panels()
    ends = {"x": [0, 1], "y": [0, 1], "mode": "lines", "hoverinfo": "skip", "name": "as sure as right"}
    figure.add_scatter(**ends, line={"color": _COLOURS[0], "width": 1, "dash": "dot"})
    colours = {"before": _COLOURS[0], "after": _COLOURS[2], "after, scaled": _COLOURS[1]}
    for name, bins in lines.items():
        total = sum(part["rows"] for part in bins) or 1
        figure.add_scatter(
            x=[part["confidence"] for part in bins],
            y=[part["accuracy"] for part in bins],
            customdata=[part["rows"] for part in bins],
            name=name,
            mode="lines+markers",
            line={"color": colours.get(name, _COLOURS[3]), "width": 2},
            marker={"size": [5 + 18 * math.sqrt(part["rows"] / total) for part in bins]},
            hovertemplate=f"{name}: %{{customdata}} rows, confidence %{{x:.2f}}, right %{{y:.2f}}<extra></extra>",
        )
    least = min((part["confidence"] for bins in lines.values() for part in bins), default=0.0)
    figure.update_xaxes(title_text="confidence", range=[max(0, least - 0.05), 1.02])
    figure.update_yaxes(title_text="share right", range=[-0.03, 1.05])
    return _html(figure, "chart-reliability", height=380)


def _add_line(figure: Figure, row: int, points: Sequence[Point], *, field: str, name: str, colour: str) -> None:
    present = [point for point in points if point.get(field) is not None]
    steps, values = [point["step"] for point in present], [point[field] for point in present]
    hover = f"step %{{x}}: %{{y:.4g}}<extra>{name}</extra>"
    mode = "lines" if len(present) > 20 else "lines+markers"
    visible = field != "learning_rate"  # its axis already names it
    look = {"mode": mode, "line": {"color": colour, "width": 2}, "showlegend": visible, "hovertemplate": hover}
    figure.add_scatter(x=steps, y=values, name=name, **look, row=row, col=1)


def _name_axes(figure: Figure, titles: Sequence[str]) -> None:
    for row, title in enumerate(titles, start=1):
        figure.update_yaxes(title_text=title, row=row, col=1)
    figure.update_yaxes(exponentformat="power", rangemode="tozero", nticks=4, row=len(titles), col=1)
    figure.update_xaxes(title_text="step", row=len(titles), col=1)


def trials_chart(numbers: Sequence[int], values: Sequence[float], best: Sequence[float], metric: str) -> str:
    """A search's metric by trial, and the best so far as a step line."""
    figure, name = _panels(), wording.name_in_words(metric)
    line = {"mode": "lines", "line": {"shape": "hv", "color": _COLOURS[1], "width": 2}, "hoverinfo": "skip"}
    figure.add_scatter(x=numbers, y=best, name="best so far", **line)
    _add_trials(figure, numbers, values, numbers, name)
    figure.update_xaxes(title_text="trial")
    return _html(figure, "chart-search", height=300)


def setting_chart(
    index: int, settings: Sequence[Any], values: Sequence[float], numbers: Sequence[int], metric: str
) -> str:
    """A search's metric by one field, a point a trial; numbers on a logarithmic axis where they span decades."""
    figure = _panels()
    _add_trials(figure, settings, values, numbers, wording.name_in_words(metric))
    words = any(isinstance(each, str) for each in settings)
    spans = not words and len(settings) > 0 and min(settings) > 0 and max(settings) >= _DECADES * min(settings)
    figure.update_xaxes(type="category" if words else "log" if spans else "linear", exponentformat="power")
    return _html(figure, f"chart-search-{index}", height=300)


def _add_trials(
    figure: Figure, places: Sequence[Any], values: Sequence[float], numbers: Sequence[int], name: str
) -> None:
    hover = f"trial %{{customdata}}: %{{x}}<br>{name} %{{y:.4g}}<extra></extra>"
    look = {"mode": "markers", "marker": {"color": _COLOURS[2], "size": 9}, "hovertemplate": hover}
    figure.add_scatter(x=places, y=values, customdata=numbers, name=name, **look)
    figure.update_yaxes(title_text=name)


def _panels(
    rows: int = 1, columns: int = 1, titles: Sequence[str] | None = None, heights: Sequence[float] | None = None
) -> Figure:
    from plotly.subplots import make_subplots

    spacing = {"vertical_spacing": 0.06, "horizontal_spacing": 0.32 / max(columns, 2)}
    return make_subplots(rows, columns, shared_xaxes=rows > 1, subplot_titles=titles, row_heights=heights, **spacing)


def _html(figure: Figure, name: str, height: int, top: int = 60, grid: bool = True) -> str:
    """A division that fits the width it is given. Its name is fixed, so that equal reports give equal pages."""
    figure.update_layout(
        height=height,
        margin={"l": 60, "r": 12, "t": top, "b": 40},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 1, "yanchor": "top"},
        hoverlabel={"bgcolor": "#222222", "font": {"color": "#ffffff"}},
        bargap=0.15,
    )
    figure.update_xaxes(gridcolor=_GRID, zerolinecolor=_GRID, fixedrange=True)
    figure.update_yaxes(gridcolor=_GRID, zerolinecolor=_GRID, fixedrange=True, automargin=True)
    if not grid:
        figure.update_xaxes(showgrid=False, zeroline=False)
        figure.update_yaxes(showgrid=False, zeroline=False)
    config = {"displayModeBar": False, "displaylogo": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config))
