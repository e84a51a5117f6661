"""`moss check` in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moss_rlhf.checking import Check


def forecast_text(check: Check) -> str:
    """A dozen plain lines: what the data is, what every stage will leave and take."""
    return "\n".join(
        [*_data_lines(check), "", *_stage_lines(check), "", *(f"note: {note}" for note in check.notes), "ok"]
    )


def _data_lines(check: Check) -> Iterator[str]:
    if check.data.labels:
        yield f"labels: {', '.join(check.data.labels)}"
    for split, facts in check.data.facts.items():
        tokens = check.tokens[split]
        dropped = ", ".join(f"{count} {reason}" for reason, count in facts["dropped"].items() if count)
        yield (
            f"{split:10}  {facts['rows']:>8} rows  {tokens['mean']:.0f} tokens on average, "
            f"{tokens['cut_share']:.1%} cut at {tokens['max_length']:.0f}"
            + (f"  (dropped: {dropped})" if dropped else "")
        )


def _stage_lines(check: Check) -> Iterator[str]:
    yield f"{'stage':15}  {'parameters':>10}  {'MACs/token':>10}  {'about':>8}  {'memory':>8}"
    yield f"{'(input)':15}  {check.parameters / 1e6:>9.2f}M"
    for stage in check.stages:
        yield (
            f"{stage.kind:15}  {stage.parameters / 1e6:>9.2f}M  {stage.macs_per_token / 1e6:>9.2f}M  "
            f"{_duration(stage.seconds):>8}  {stage.memory_bytes / 1e9:>5.1f} GB"
        )
    seconds = sum(stage.seconds for stage in check.stages)
    yield f"training in all: about {_duration(seconds)} on this machine; then export and measuring, a minute or two"
    if check.trainings > 1:
        together = _duration(check.trainings * seconds)
        yield f"search: up to {check.trainings:.3g} such trainings, about {together} together"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
