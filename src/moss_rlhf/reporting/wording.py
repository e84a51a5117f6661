"""Numbers as a person reads them. A number that was not measured (None) says so."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

NOT_MEASURED = "not measured"
Mark = Literal["better", "worse", "same", "unknown"]
_CHANCE = 0.05  # a p-value from which a difference may well be chance


def _if_measured(words: Callable[[float], str]) -> Callable[[float | None], str]:
    """`words`, which says "not measured" where there is no number."""

    @functools.wraps(words)
    def words_or_not(value: float | None) -> str:
        return NOT_MEASURED if value is None else words(value)

    return words_or_not


_SPELLED = {"bleu": "BLEU", "chrf": "chrF"}


def significant(value: float, digits: int = 3) -> str:
    """Rounded to `digits` significant digits, without an exponent from 0.001 up: 1,234 · 12.3 · 0.012."""
    if value == 0:
        return "0"
    if abs(value) < 0.001:
        return _minus(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _minus(f"{value:,.{decimals}f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _with_prefix(value: float, unit: str) -> str:
    power = 0 if value < 1 else min(6, int(math.log10(value) // 3))
    return f"{significant(value / 1000**power)} {('', 'k', 'M', 'G', 'T', 'P', 'E')[power]}{unit}"


@_if_measured
def count(value: float) -> str:
    return f"{value:,.0f}"


@_if_measured
def size(value: float) -> str:
    """Bytes in decimal units: 90900000 → 90.9 MB."""
    return _with_prefix(value, "B")


@_if_measured
def flops(value: float) -> str:
    """Floating-point operations: 1.2e15 → 1.20 PFLOP."""
    return _with_prefix(value, "FLOP")


@_if_measured
def milliseconds(value: float) -> str:
    return f"{significant(value)} ms"


@_if_measured
def rate(value: float) -> str:
    """Texts per second."""
    return f"{significant(value)} /s"


@_if_measured
def duration(seconds: float) -> str:
    """8.2 s · 42 s · 12 min 5 s · 1 h 20 min."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


@_if_measured
def times(ratio: float) -> str:
    """4.23 → 4.2×, 16.4 → 16×."""
    return f"{ratio:.1f}×" if ratio < 9.95 else f"{ratio:,.0f}×"


@_if_measured
def score(value: float) -> str:
    """A metric's value: 0.871, or 23.45 where it is no share."""
    return _minus(f"{value:.3f}") if abs(value) < 10 else significant(value, 4)


@_if_measured
def signed(value: float) -> str:
    """With its sign: −0.006, +0.004; what rounds to nothing is ±0.000."""
    if abs(value) >= 10:
        return f"{'−' if value < 0 else '+'}{significant(abs(value), 4)}"
    return "±0.000" if abs(value) < 0.0005 else _minus(f"{value:+.3f}")


def estimate(value: Mapping[str, float | None] | None) -> str:
    """A metric with its interval: 0.871 (0.848 to 0.893)."""
    if value is None or value["value"] is None:
        return NOT_MEASURED
    if value.get("low") is None or value.get("high") is None:
        return score(value["value"])
    return f"{score(value['value'])} ({score(value['low'])} to {score(value['high'])})"


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def name_in_words(name: object) -> str:
    """feed_forward → feed forward, text-classification → text classification, bleu → BLEU."""
    return _SPELLED.get(str(name), str(name).replace("_", " ").replace("-", " "))


def title_in_words(name: object) -> str:
    """token_accuracy → Token accuracy, bleu → BLEU."""
    return _SPELLED.get(str(name), name_in_words(name).capitalize())


# --- what a number means ---------------------------------------------------------------------------------------------


def mark_of_ratio(ratio: float | None) -> Mark:
    """Above 1 is better; what rounds to 1.0× is the same."""
    if ratio is None:
        return "unknown"
    if times(max(ratio, 1 / ratio)) == "1.0×":
        return "same"
    return "better" if ratio > 1 else "worse"


def mark_of_metric(change: Mapping[str, Any]) -> Mark:
    """Better or worse only where the interval of the difference leaves out zero, and the test agrees.

    Of few answers that all changed to one side every resample does, too: the interval leaves out zero, and an exact
    test says that three coins may well fall alike. Which of the two it is, the metric's direction says.
    """
    if change["low"] is None or change["high"] is None:
        return "unknown"
    chance = change.get("p_value")
    if change["low"] <= 0 <= change["high"] or (chance is not None and chance >= _CHANCE):
        return "same"
    return "better" if (change["low"] > 0) != lower_is_better(change) else "worse"


def lower_is_better(change: Mapping[str, Any]) -> bool:
    """Whether a fall of the metric is a gain, as of perplexity."""
    return bool(change.get("lower_is_better", False))


def ratio_in_words(ratio: float, better: str, worse: str, same: str) -> str:
    """4.2 → `4.2× smaller`, 0.5 → `2.0× larger`, 1.01 → `the same size`."""
    mark = mark_of_ratio(ratio)
    if mark == "same":
        return same
    return f"{times(max(ratio, 1 / ratio))} {better if mark == 'better' else worse}"


def change_in_words(change: Mapping[str, Any], confidence: float) -> str:
    """The difference of a metric: `−0.006, 95 % interval −0.017 to +0.004: no significant difference`."""
    mark = mark_of_metric(change)
    if mark == "unknown":
        return f"{signed(change['delta'])}, interval not measured"
    moved = "rose" if change["low"] > 0 else "fell"
    conclusion = {
        "same": "no significant difference",
        "better": f"{name_in_words(change['name'])} {moved}, outside what chance explains",
        "worse": f"{name_in_words(change['name'])} {moved}, outside what chance explains",
    }[mark]
    bounds = f"{signed(change['low'])} to {signed(change['high'])}"
    if mark == "same" and not change["low"] <= 0 <= change["high"]:
        conclusion += f" (p = {significant(change['p_value'], 2)})"
    return f"{signed(change['delta'])}, {percent(confidence)} interval {bounds}: {conclusion}"
