"""Which weights of a matrix may become zero together: any, n of every m, or whole blocks. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """Unstructured where both are None.

    keep    (n, m): n of every m neighbours along the input stay, such as 2 of 4.
    block   (rows, columns) that go or stay as one.
    """

    keep: tuple[int, int] | None = None
    block: tuple[int, int] | None = None

    @property
    def sparsity(self) -> float | None:
        """What an n:m pattern says by itself."""
        return None if self.keep is None else 1 - self.keep[0] / self.keep[1]


def parse_pattern(text: str) -> Pattern:
    """'unstructured', n:m such as '2:4' (2 of 4 stay), or rows x columns such as '4x1'; ValueError on anything else."""
    if text == "unstructured":
        return Pattern()
    found = re.fullmatch(r"(\d{1,4})([:x])(\d{1,4})", text)
    first, last = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[2] == ":" and 0 < first < last:
        return Pattern(keep=(first, last))
    if found and found[2] == "x" and first and last:
        return Pattern(block=(first, last))
    raise ValueError(f"pattern must be unstructured, n:m with n < m such as 2:4, or a block such as 4x1, got {text!r}")


def misfit(out: int, width: int, pattern: Pattern, sparsity: float) -> str | None:
    """Why a matrix (out, width) can't be pruned so, as one sentence without its subject, else None."""
    rows, columns = pattern.block or (1, 1)
    if width % (pattern.keep[1] if pattern.keep else columns) or out % rows:
        return (
            f"is {out} x {width}, which the pattern does not fit. Give a pattern whose sizes divide every matrix's "
            "rows and columns."
        )
    units = out * width // (rows * columns)
    if int(units * sparsity + 1e-9) == 0:
        unit = "block" if pattern.block else "weight"
        return f"has {units} {unit}s, and sparsity {sparsity} is less than one of them. Give a larger one."
    return None
