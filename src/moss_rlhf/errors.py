"""The one exception tree. Every message gives the value, the rule, the place and the remedy.

MossError                 anything that moss-rlhf raises on purpose        exit status 1
└── UserError             the input can't be used as it is                 exit status 2
    ├── RecipeError       a field of the recipe
    ├── DataError         a data file: its lines, columns, labels
    ├── ModelError        a checkpoint: where it is, what it holds, what a stage asks of it
    └── MachineError      disk, permissions, a missing optional package

Interrupted (a KeyboardInterrupt) means that the work stopped at a point it resumes from; exit status 130.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MossError(Exception):
    """Base of every error raised on purpose."""


class UserError(MossError):
    """What the user gave can't be used; the message says what to change."""


class RecipeError(UserError):
    """A field of the recipe is wrong."""


class DataError(UserError):
    """A data file is wrong."""


class ModelError(UserError):
    """A checkpoint is missing, broken, or not fit for what is asked of it."""


class MachineError(UserError):
    """The machine can't do it: no space, no permission, a package that is not installed."""


class Interrupted(KeyboardInterrupt):
    """Stopped on request, with everything finished so far on disk."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that helps after an unknown name, `did you mean 'epochs'? Known: …`; lr may be a name's initials."""
    names = sorted(known)
    short = [each for each in names if "_" in each and "".join(word[:1] for word in each.split("_")) == name.lower()]
    close = short or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known names: {', '.join(names)}."
