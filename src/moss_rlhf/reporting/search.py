"""What a search found, for the page and the terminal: its trials in order of value, its winner in words."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from moss_rlhf.reporting import charts, wording

Search = Mapping[str, Any]
Trial = Mapping[str, Any]


def sorted_trials(search: Search) -> list[Trial]:
    """Best first, of equals the earlier; then those that came to no value, in the order they were tried."""
    sign = 1 if search["lower_is_better"] else -1
    done = [trial for trial in search["trials"] if trial["value"] is not None]
    rest = [trial for trial in search["trials"] if trial["value"] is None]
    return [*sorted(done, key=lambda trial: (sign * trial["value"], trial["number"])), *rest]


def fields(search: Search) -> list[str]:
    """What varied, as the recipe has it."""
    return list(dict.fromkeys(field for trial in search["trials"] for field in trial["values"]))


def value_in_words(value: object) -> str:
    """A setting as it would stand in a recipe: 0.0001 · gradual · {"patience": 2}."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def outcome_in_words(trial: Trial) -> str:
    """`done`, `stopped: below the median …`, `failed: …`."""
    return f"{trial['state']}: {trial['why']}" if trial["why"] else str(trial["state"])


def trials_in_words(search: Search) -> str:
    """`20 trials: 14 done, 5 stopped early, 1 failed.`"""
    names = {"done": "done", "stopped": "stopped early", "failed": "failed"}
    counts = {words: sum(trial["state"] == state for trial in search["trials"]) for state, words in names.items()}
    parts = ", ".join(f"{count} {words}" for words, count in counts.items() if count)
    return f"{_counted(len(search['trials']), 'trial')}: {parts}."


def winner_in_words(search: Search, confidence: float = 0.95) -> str:
    """What the winner is worth when it is trained again, beside what it reached as the best of many."""
    metric, winner, best = search["metric"], search["winner"], sorted_trials(search)[0]
    part = f", each trained on {search['rows']:,} rows" if search.get("rows") else ""
    chosen = (
        f"Trial {best['number']} won with {metric} {wording.score(best['value'])} on {search['split']}{part}; the best "
        "of many is partly luck."
    )
    if winner is None:
        return f"{chosen} It was not trained again with other seeds."
    again = f"Trained again with {_counted(winner['seeds'], 'other seed')}"
    values = ", ".join(wording.score(value) for value in winner["values"])
    if winner["low"] is None:
        return f"{chosen} {again} it reaches {values}; a single training says nothing of how far others would differ."
    sure = f"with {wording.percent(confidence)} confidence the true mean lies between"
    bounds = f"{wording.score(winner['low'])} and {wording.score(winner['high'])}"
    return f"{chosen} {again} it reaches {wording.score(winner['mean'])} on average ({values}); {sure} {bounds}."


def terminal_line(search: Search) -> str:
    """`best of 20 trials 0.912, again with 3 seeds 0.905 (0.894 to 0.916), accuracy on validation`."""
    winner, best = search["winner"], sorted_trials(search)[0]
    trials = f"best of {_counted(len(search['trials']), 'trial')} {wording.score(best['value'])}"
    of_what = f"{wording.name_in_words(search['metric'])} on {search['split']}"
    if winner is None:
        return f"{trials}, {of_what}"
    again = wording.estimate({"value": winner["mean"], "low": winner["low"], "high": winner["high"]})
    return f"{trials}, again with {_counted(winner['seeds'], 'seed')} {again}, {of_what}"


def search_charts(search: Search) -> dict[str, str]:
    """{title: chart}: the metric by trial with the best so far, then by each field that varied."""
    done = [trial for trial in search["trials"] if trial["value"] is not None]
    numbers, values = [trial["number"] for trial in done], [trial["value"] for trial in done]
    best = _best_so_far(values, search["lower_is_better"])
    drawn = {"By trial": charts.trials_chart(numbers, values, best, search["metric"])}
    for index, field in enumerate(fields(search)):
        settings = [trial["values"][field] for trial in done]
        numeric = all(isinstance(each, int | float) and not isinstance(each, bool) for each in settings)
        shown = settings if numeric else [value_in_words(each) for each in settings]
        drawn[f"By {field}"] = charts.setting_chart(index, shown, values, numbers, search["metric"])
    return drawn


def _best_so_far(values: Sequence[float], lower_is_better: bool) -> list[float]:
    better = min if lower_is_better else max
    return [better(values[: count + 1]) for count in range(len(values))]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
