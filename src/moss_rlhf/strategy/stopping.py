"""Which checkpoint is the best, and when to stop looking for a better one. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; ties go to the lower loss, then to the earlier one.

    metric   higher is better.
    waited   evaluations since.
    """

    metric: float = float("-inf")
    loss: float = float("inf")
    step: int = 0
    waited: int = 0

    def after(self, metric: float, loss: float, step: int) -> Best:
        """The best after one more evaluation."""
        if (metric, -loss) > (self.metric, -self.loss):
            return Best(metric, loss, step)
        return Best(self.metric, self.loss, self.step, self.waited + 1)
