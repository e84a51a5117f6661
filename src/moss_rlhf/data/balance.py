"""Rows of unequally many classes → equally many, by repeating or leaving out. Seeded, and of train only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.columns import Column
from moss_rlhf.data.splits import Splits
from moss_rlhf.errors import RecipeError
from moss_rlhf.files import digest

Indices = NDArray[np.int64]
Balance = Literal["oversample", "undersample"]


def balanced_rows(classes: Indices, how: Balance, seed: int) -> Indices:
    """Positions, rising, of which every class that occurs has equally many.

    undersample   as many of each as the rarest class has, drawn without replacement.
    oversample    as many of each as the most frequent class has: every row as often as any other of its class, or once
                  more; which ones, is drawn.
    """
    names, counts = np.unique(classes, return_counts=True)
    wanted = int(counts.max() if how == "oversample" else counts.min())
    parts = []
    for name, count in zip(names, counts, strict=True):
        rows, generator = np.flatnonzero(classes == name), np.random.default_rng([seed, int(name)])
        drawn = generator.permutation(rows)[: wanted % count] if wanted % count or wanted < count else rows[:0]
        parts.append(np.concatenate([np.repeat(rows, wanted // count), drawn]))
    return np.sort(np.concatenate(parts))


def balance_train(splits: Splits, columns: Sequence[Column], how: Balance, seed: int) -> Splits:
    """The splits with a balanced train; validation and test stay as they are, for they say what is to be expected.

    raises   RecipeError on a task without classes.
    """
    label = next((column.name for column in columns if column.kind == "label"), None)
    if label not in splits.train.column_names:
        raise RecipeError(f"data.balance: {how} needs classes, and this task has none. Leave it out.")
    rows = balanced_rows(np.asarray(splits.train[label][:], dtype=np.int64), how, seed)
    train, facts = splits.train.select(rows), splits.facts["train"]
    counts = np.bincount(train[label][:], minlength=len(splits.labels))
    missing = len(splits.train) - len(rows) if how == "undersample" else 0
    changed = facts | {
        "rows": len(rows),
        "dropped": facts["dropped"] | ({"undersampled": missing} if missing else {}),
        "classes": dict(zip(splits.labels, counts.tolist(), strict=True)),
        "balanced": {"how": how, "before": facts.get("classes", {})},
    }
    origins = {
        name: dataclasses.replace(origin, lines=origin.lines[rows]) if name == "train" else origin
        for name, origin in splits.origins.items()
    }
    return dataclasses.replace(
        splits,
        train=train,
        facts=splits.facts | {"train": changed},
        digest=digest([splits.digest, how, seed]),
        origins=origins,
    )
