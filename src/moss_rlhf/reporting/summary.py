"""What a report comes to, in sentences: the verdict, the reasons to believe it, the lines that end a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moss_rlhf.reporting import search, sensitivity, wording

Report = Mapping[str, Any]


_TOLERABLE_LOSS = 0.02  # an interval that reaches further is too wide to speak of no loss; of a perplexity, a share


def main_metric(report: Report) -> str | None:
    """The name of the metric that the gain is judged by; without a gain, the first that was measured."""
    if report["gain"] is not None:
        return str(report["gain"]["metric"]["name"])
    return next(iter(report["after"]["metrics"]), None)


def stage_metric(report: Report) -> str | None:
    """The metric that stages are followed by: that of the gain, or the first that they were measured by."""
    measured = [(stage.get("measurement") or {}).get("metrics") or {} for stage in report["stages"]]
    name = main_metric(report)
    return (
        name
        if any(name in metrics for metrics in measured)
        else next((next(iter(each)) for each in measured if each), name)
    )


def confidence(report: Report) -> float:
    return float(report["recipe"]["evaluate"]["confidence"])


def smallest_batch(values: Mapping[str, Any] | None) -> str | None:
    return min(values, key=int) if values else None


def largest_batch(values: Mapping[str, Any] | None) -> str | None:
    return max(values, key=int) if values else None


def speed_ratios(gain: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The two that the verdict gives: throughput of the largest batch, latency of the smallest; None if unmeasured."""
    if gain.get("identical"):  # what differs is the machine's noise
        return 1.0, 1.0
    speedup, latency = gain["speedup"], gain["latency"]
    return speedup.get(largest_batch(speedup)), latency.get(smallest_batch(latency))


# --- the verdict -----------------------------------------------------------------------------------------------------


def headline(report: Report) -> str:
    """The verdict in a few words: `Faster, smaller, no measurable loss of accuracy`."""
    gain = report["gain"]
    if gain is None:
        return "Nothing to compare with"
    if gain.get("identical"):
        return "Before and after are the same model: nothing was compressed"
    words = [_speed_word(gain), _size_word(gain), _metric_word(gain["metric"], _tolerable_loss(report))]
    text = ", ".join(word for word in words if word)
    return text[0].upper() + text[1:]


def _speed_word(gain: Mapping[str, Any]) -> str:
    marks = [wording.mark_of_ratio(ratio) for ratio in speed_ratios(gain)]
    if marks == ["better", "worse"]:
        return "more texts per second but higher latency"
    if marks == ["worse", "better"]:
        return "lower latency but fewer texts per second"
    words = {"better": "faster", "worse": "slower", "same": "as fast"}
    return next((word for mark, word in words.items() if mark in marks), "")


def _size_word(gain: Mapping[str, Any]) -> str:
    words = {"better": "smaller", "worse": "larger", "same": "the same size", "unknown": ""}
    return words[wording.mark_of_ratio(gain["size"])]


def _metric_word(change: Mapping[str, Any], tolerable: float) -> str:
    name, lower = wording.name_in_words(change["name"]), wording.lower_is_better(change)
    loss = "rise" if lower else "loss"
    if wording.mark_of_metric(change) == "same" and _worst_loss(change) > tolerable:
        return f"a {loss} of {name} not ruled out"
    got_worse = change["delta"] >= 0 if lower else change["delta"] <= 0
    return {
        "better": f"{name} {'down' if lower else 'up'}",
        "worse": f"{name} {'up' if lower else 'down'}",
        "same": f"no measurable {loss if got_worse else 'change'} of {name}",
        "unknown": f"{name} not judged",
    }[wording.mark_of_metric(change)]


def _worst_loss(change: Mapping[str, Any]) -> float:
    """How much worse the metric may truly be, by the end of the interval."""
    return float(change["high"] if wording.lower_is_better(change) else -change["low"])


def _tolerable_loss(report: Report) -> float:
    """In the metric's own unit: a perplexity has no scale of its own, so it is measured against the one before."""
    change = report["gain"]["metric"]
    if not wording.lower_is_better(change):
        return _TOLERABLE_LOSS
    return _TOLERABLE_LOSS * float((report["before"]["metrics"].get(change["name"]) or {"value": 0})["value"])


def verdict(report: Report) -> str:
    """One sentence with the numbers that decide."""
    if report["gain"] is None:
        return _verdict_alone(report)
    ratios = ", ".join(_ratio_clauses(report["gain"]))
    return "; ".join(clause for clause in (ratios, metric_clause(report)) if clause) + "."


def _verdict_alone(report: Report) -> str:
    name = main_metric(report)
    reached = wording.estimate(report["after"]["metrics"].get(name))
    notes = " ".join(report["notes"]) or "The report gives no reason."
    return f"There is no comparison with the model before compression. {notes} It reaches {name or 'metric'} {reached}."


def _ratio_clauses(gain: Mapping[str, Any]) -> list[str]:
    speed, latency = speed_ratios(gain)
    clauses = (
        (speed, "more texts per second", "fewer texts per second", "as many texts per second"),
        (latency, "lower latency", "higher latency", "the same latency"),
        (gain["size"], "smaller", "larger", "the same size"),
    )
    return [wording.ratio_in_words(ratio, *words) for ratio, *words in clauses if ratio is not None]


def metric_clause(report: Report) -> str:
    """`accuracy 0.871 → 0.865 (−0.006, 95 % interval …: no significant difference)`; needs a gain."""
    change = report["gain"]["metric"]
    before, after = (report[side]["metrics"].get(change["name"]) or {} for side in ("before", "after"))
    values = f"{wording.score(before.get('value'))} → {wording.score(after.get('value'))}"
    return f"{wording.name_in_words(change['name'])} {values} ({wording.change_in_words(change, confidence(report))})"


# --- why to believe it -----------------------------------------------------------------------------------------------


def reasons(report: Report) -> list[str]:
    """What the verdict rests on, and what it can't say; one sentence or two each."""
    found = [_what_was_measured(report), _which_rows(report), _how_sure(report), _share_of_precision(report)]
    int8 = report["machine"].get("int8")
    return [
        sentence for sentence in (*found, f"Integer arithmetic on this machine: {int8}" if int8 else "") if sentence
    ]


def _what_was_measured(report: Report) -> str:
    after = report["after"]
    return f"Every number of the result was measured on {after['artifact']} itself, run by {after['runtime']}."


def _which_rows(report: Report) -> str:
    after = report["after"]
    judged = _judged_rows(after)
    sample = f"{wording.count(judged)} of " if judged != after["rows"] else ""
    rows = f"Quality was measured on {sample}the {wording.count(after['rows'])} rows of the {after['split']} split"
    if after["split"] == "test":
        return f"{rows}, which no stage has seen."
    return f"{rows}, which also chose the best checkpoints: expect a little less on new texts."


def _how_sure(report: Report) -> str:
    if report["gain"] is None or report["gain"]["metric"]["low"] is None:
        return ""
    change = report["gain"]["metric"]
    name, low, high = wording.name_in_words(change["name"]), change["low"], change["high"]
    chance = "" if change["p_value"] is None else f" (p = {wording.significant(change['p_value'], 2)})"
    bounds = f"{wording.signed(low)} and {wording.signed(high)}"
    sure = f"With {wording.percent(confidence(report))} confidence"
    if low == high == 0:  # resampling what never differs tells nothing: the rule of three does (Hanley 1983)
        most = wording.percent(3 / report["after"]["rows"])
        return f"No answer counted differently. {sure}, less than {most} of new texts would (3 / rows)."
    sentence = f"{sure} the true change of {name} lies between {bounds}{chance}."
    worst, undecided = _worst_loss(change), wording.mark_of_metric(change) == "same"
    if undecided and not low <= 0 <= high:
        sentence = (
            f"Resampled, the change of {name} lies between {bounds}; it may be chance{chance}: few answers differ."
        )
    if not undecided or worst < 0.0005:
        return sentence
    direction = "rise" if wording.lower_is_better(change) else "fall"
    return f"{sentence} So a {direction} of up to {wording.score(worst)} can't be ruled out with this many rows."


def _share_of_precision(report: Report) -> str:
    """How much of the speed the number format gives, against the same network in float32 on the same runtime."""
    batch = largest_batch((report.get("reference") or {}).get("throughput"))
    before, same_shape, after = (_speed(report, side, "throughput", batch) for side in ("before", "reference", "after"))
    if before is None or same_shape is None or after is None:
        return ""
    return (
        f"In batches of {batch}, the new shape and runtime alone, in float32, are {wording.times(same_shape / before)} "
        f"as fast as before; the number format multiplies that by {wording.significant(after / same_shape)}."
    )


# --- the terminal ----------------------------------------------------------------------------------------------------


def terminal_summary(report: Report) -> str:
    """Six to ten plain lines for the end of a run, and a table of what was found sensitive, where it was measured."""
    lines = [headline(report), *_terminal_rows(report), f"  {'cost':<12}{cost_in_words(report)}"]
    if report.get("search"):
        lines.append(f"  {'search':<12}{search.terminal_line(report['search'])}")
    lines.append(f"  {'measured':<12}{report['after']['artifact']}, {report['after']['runtime']}")
    notes = list(report["notes"])
    room = 10 - len(lines)
    shown = notes if len(notes) <= room else notes[: room - 1]
    lines += [f"  note: {note}" for note in shown]
    left = len(notes) - len(shown)
    lines += [f"  and {left} more notes in the report"] if left else []
    tables = [f"  {line}" for _, table in sensitivity.tables(report) for line in sensitivity.text_lines(table)]
    return "\n".join([*lines, *tables])


def _judged_rows(measurement: Mapping[str, Any]) -> Any:  # a number, or None
    """Rows behind the metric of the gain: of a translator's BLEU a sample."""
    return measurement.get("translated") or measurement["rows"]


def _terminal_rows(report: Report) -> list[str]:
    after, name = report["after"], main_metric(report)
    quality = metric_clause(report) if report["gain"] else f"{name} {wording.estimate(after['metrics'].get(name))}"
    rows = {
        "quality": f"{quality}, {wording.count(_judged_rows(after))} {after['split']} rows",
        "speed": speed_in_words(report),
        "latency": latency_in_words(report),
        "size": size_in_words(report),
    }
    return [f"  {title:<12}{text}" for title, text in rows.items()]


def speed_in_words(report: Report) -> str:
    """`142 /s → 597 /s, texts in batches of 32`."""
    batch = largest_batch(report["after"].get("throughput"))
    before, after = (wording.rate(_speed(report, side, "throughput", batch)) for side in ("before", "after"))
    return _before_after(report, before, after, f", texts in batches of {batch}" if batch else "")


def latency_in_words(report: Report) -> str:
    """`8.21 ms → 0.902 ms, median for one text`."""
    batch = smallest_batch(report["after"].get("latency_ms"))
    found = [_speed(report, side, "latency_ms", batch) or {"p50": None} for side in ("before", "after")]
    before, after = (wording.milliseconds(values["p50"]) for values in found)
    texts = "one text" if batch == "1" else f"a batch of {batch}"
    return _before_after(report, before, after, f", median for {texts}" if batch else "")


def _speed(report: Report, side: str, field: str, batch: str | None) -> Any:  # a rate, or percentiles
    return ((report.get(side) or {}).get(field) or {}).get(batch)


def size_in_words(report: Report) -> str:
    before, after = (wording.size((report[side] or {}).get("bytes")) for side in ("before", "after"))
    return _before_after(report, before, after, " of weight files")


def _before_after(report: Report, before: str, after: str, unit: str) -> str:
    return f"{after}{unit}" if report["before"] is None else f"{before} → {after}{unit}"


def cost_in_words(report: Report) -> str:
    """What the pipeline took, and how that compares with plain fine-tuning of the dense model."""
    cost = report["cost"]
    spent = f"{wording.duration(cost['seconds'])}, training {wording.flops(cost['flops'])}"
    pairs = (("time", cost["seconds"], cost["dense_seconds"]), ("training FLOPs", cost["flops"], cost["dense_flops"]))
    ratios = [
        f"{wording.times(whole / dense)} the {name}" for name, whole, dense in pairs if whole is not None and dense
    ]
    return f"{spent}: {' and '.join(ratios)} of plain fine-tuning of the dense model" if ratios else spent
