"""Which checkpoint is the best, and when to stop looking for a better one. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; ties go to the lower loss, then to the earlier one.

    waited            evaluations since.
    lower_is_better   of the metric, such as perplexity.
    """

    metric: float | None = None
    loss: float = float("inf")
    step: int = 0
    waited: int = 0
    lower_is_better: bool = False

    def after(self, metric: float, loss: float, step: int) -> Best:
        """The best after one more evaluation."""
        if self.metric is None or self._rank(metric, loss) > self._rank(self.metric, self.loss):
            return Best(metric, loss, step, lower_is_better=self.lower_is_better)
        return replace(self, waited=self.waited + 1)

    def _rank(self, metric: float, loss: float) -> tuple[float, float]:
        return (-metric if self.lower_is_better else metric), -loss


@dataclass(frozen=True)
class Judge:
    """Reads a training's log, in which an evaluation's entry has the keys eval_loss, eval_<metric> and step.

    metric   what decides; the loss decides between equals.
    since    the first step whose evaluation counts.
    """

    metric: str
    lower_is_better: bool = False
    since: int = 0

    def sees(self, entry: Mapping[str, float]) -> bool:
        """Whether an entry is an evaluation that counts."""
        return f"eval_{self.metric}" in entry and entry["step"] >= self.since

    def rank(self, entry: Mapping[str, float]) -> tuple[float, float]:
        """The higher the better."""
        value = entry[f"eval_{self.metric}"]
        return (-value if self.lower_is_better else value), -entry["eval_loss"]

    def best(self, log: Sequence[Mapping[str, float]]) -> Best:
        """The best evaluation of a log; so a resumed run needs no other memory of it."""
        best = Best(lower_is_better=self.lower_is_better)
        for entry in filter(self.sees, log):
            best = best.after(entry[f"eval_{self.metric}"], entry["eval_loss"], int(entry["step"]))
        return best
