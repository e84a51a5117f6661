"""What a solver had to do without: recorded, so that the facts can say it."""

from __future__ import annotations

from dataclasses import dataclass, field

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal; a singular one gets more, by itself."""


@dataclass
class Fallbacks:
    """By the names of matrices.

    damping   the share that was needed, where it was more than `DAMPING`.
    short     why the tokens could not tell all input features apart.
    """

    damping: dict[str, float] = field(default_factory=dict)
    short: dict[str, str] = field(default_factory=dict)

    def note(self, name: str, *, damping: float, tokens: int, width: int) -> None:
        """Keep what of one solved matrix was not as asked for; `tokens` were seen, by a matrix of `width` inputs."""
        if damping > DAMPING:
            self.damping[name] = damping
        if sentence := shortage(tokens, width):
            self.short[name] = sentence

    def facts(self) -> dict[str, object]:
        found: dict[str, object] = {"damping_raised": self.damping} if self.damping else {}
        if self.short:
            found["too_few_tokens"] = f"{len(self.short)} matrices: {next(iter(self.short.values()))}"
        return found


def shortage(tokens: int, width: int) -> str | None:
    """One sentence for the facts where the tokens cannot tell all input features apart, else None."""
    if tokens >= width:
        return None
    return (
        f"{tokens} calibration tokens span at most {tokens} of {width} input directions; damping stands in for the "
        f"rest. Give at least {width} tokens."
    )
