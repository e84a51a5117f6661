"""Which checkpoint is the best, and when to stop looking for a better one. Pure."""

from __future__ import annotations

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
