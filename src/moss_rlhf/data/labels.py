"""Label values → label names → class ids."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence

_WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,17}))(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def label_name(value: object) -> str:
    """The name of a label as it stands in a file: 1, 1.0, "1" and " 1.0" are all '1'; '' where there is none.

    raises  TypeError for a list or a mapping.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if not isinstance(value, str | int | float):
        raise TypeError(f"the label is a {type(value).__name__}, it must be a text or a number")
    text = str(value).strip()
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


def is_score(name: str) -> bool:
    """Whether a label name is a number that is not whole."""
    return _NUMBER.fullmatch(name) is not None and not float(name).is_integer()


def order_labels(names: Collection[str], known: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names in class-id order: that of `known` where it holds the same names, else sorted, as numbers where all are."""
    if known is not None and set(known) == set(names):
        return tuple(known)
    numeric = all(_NUMBER.fullmatch(name) for name in names)
    return tuple(sorted(names, key=lambda name: (float(name) if numeric else 0.0, name)))


def shifted_codes(known: Iterable[str], names: Iterable[str]) -> dict[int, int] | None:
    """{code in `names`: code in `known`} where all are whole numbers that agree once shifted by one, else None."""
    texts, others = list(known), list(names)
    if not all(_WHOLE.fullmatch(name) for name in [*texts, *others]):
        return None
    codes = {int(name) for name in texts}
    shifts = ({int(name): int(name) + shift for name in others} for shift in (-1, 1))
    return next((dict(sorted(shift.items())) for shift in shifts if set(shift.values()) <= codes), None)
