"""Which rows each split keeps: leaks dropped, a share held out, a subset taken. Functions of labels and digests.

Without labels all rows are of one class, number 0: what is said of classes holds for them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.labels import order_labels, shifted_codes
from moss_rlhf.data.scanning import Labels, Scan
from moss_rlhf.errors import DataError
from moss_rlhf.recipe import DataSpec

Indices = NDArray[np.int64]
FORM = 2  # of what is kept; a higher number makes digests others
_SPLITS = ("train", "validation", "test")
_LEAST_CLASSES = 2


@dataclass
class Part:
    """A split on its way: the scan its rows come from, which of them it keeps, and how many went for which reason."""

    scan: Scan
    classes: Indices
    texts: Indices
    rows: Indices
    dropped: dict[str, int] = field(default_factory=dict)

    def drop_texts_of(self, other: Part, reason: str) -> None:
        leaked = np.isin(self.texts[self.rows], other.texts[other.rows])
        self.keep(self.rows[~leaked], reason)

    def keep(self, rows: Indices, reason: str) -> None:
        if len(rows) < len(self.rows):
            self.dropped[reason] = len(self.rows) - len(rows)
        self.rows = rows


@dataclass(frozen=True)
class Plan:
    """The rows of every split, as positions in its scan, with what a report says about them.

    labels  names in class-id order, () without;  classes  {split: class id of every row of its scan}
    rows    {split: positions kept, rising};  facts, notes  as in `Splits`
    """

    labels: tuple[str, ...]
    classes: dict[str, Indices]
    rows: dict[str, Indices]
    facts: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def make_plan(scans: Mapping[str, Scan], spec: DataSpec, seed: int, known_labels: Sequence[str] | None) -> Plan:
    """Choose the rows of every split.

    A text in two splits goes from train first, then from validation, never from test. A share is held out of what is
    left of train, stratified and seeded; limits come last.

    raises  DataError where labels don't agree, or one class or nothing is left.
    """
    labels = _agreed_labels(scans, known_labels)
    parts = _separate(_parts(scans, labels), spec.validation, seed)
    _limit(parts, spec, seed, labels)
    facts = {split: _facts(part, labels) for split, part in parts.items()}
    return Plan(
        labels,
        {split: part.classes for split, part in parts.items()},
        {split: part.rows for split, part in parts.items()},
        facts,
        tuple(_notes(parts, facts)),
    )


def _agreed_labels(scans: Mapping[str, Scan], known: Sequence[str] | None) -> tuple[str, ...]:
    """The names of every split's labels in class-id order; () where the task has none."""
    train = scans["train"].labels
    if train is None:
        return ()
    for split, scan in scans.items():
        _check_same_labels(split, scan, train)
    if len(train.names) < _LEAST_CLASSES:
        place, only = scans["train"].place, train.names[0]
        raise DataError(f"{place}: every label is {only!r}; a classifier needs two classes or more.")
    return order_labels(train.names, known)


def _check_same_labels(split: str, scan: Scan, train: Labels) -> None:
    found = scan.labels or Labels([], [], np.zeros(0, dtype=np.int32))
    unknown = [name for name in found.names if name not in train.names]
    if unknown:
        line = found.lines[found.names.index(unknown[0])]
        place = f"{scan.place}, {scan.unit} {line}: the label {unknown[0]!r} does not occur in train"
        raise DataError(f"{place} (known: {', '.join(order_labels(train.names))}). {_remedy(split, found, train)}")


def _remedy(split: str, scan: Labels, train: Labels) -> str:
    codes = shifted_codes(train.names, scan.names)
    if codes is None:
        return f"Correct it, or name it as train does with data.{split}.labels: {{its name here: its name in train}}."
    mapping = ", ".join(f"{code}: {known}" for code, known in codes.items())
    return f"The codes look shifted by one; if so, set data.{split}.labels: {{{mapping}}}."


def _parts(scans: Mapping[str, Scan], labels: Sequence[str]) -> dict[str, Part]:
    numbers = number_texts([scan.digests for scan in scans.values()])
    parts = {}
    for (split, scan), texts in zip(scans.items(), numbers, strict=True):
        parts[split] = Part(scan, _class_ids(scan, labels), texts, np.arange(len(texts)))
    return parts


def _class_ids(scan: Scan, labels: Sequence[str]) -> Indices:
    if scan.labels is None:
        return np.zeros(len(scan.digests), dtype=np.int64)
    ids = np.array([labels.index(name) for name in scan.labels.names], dtype=np.int64)
    return ids[scan.labels.positions]


def number_texts(digests: Sequence[NDArray[np.uint64]]) -> list[Indices]:
    """For each (rows, 2) array of digests, (rows,) whole numbers, equal where digests are equal in any of them."""
    every = np.concatenate(digests)
    order = np.lexsort((every[:, 1], every[:, 0]))
    ordered = every[order]
    starts = np.concatenate([[False], (ordered[1:] != ordered[:-1]).any(axis=1)])
    numbers = np.empty(len(every), dtype=np.int64)
    numbers[order] = np.cumsum(starts)
    return np.split(numbers, np.cumsum([len(part) for part in digests])[:-1])


def _separate(parts: dict[str, Part], validation: object, seed: int) -> dict[str, Part]:
    """The parts with no text in two of them, in the order train, validation, test."""
    for split in ("train", "validation"):
        if split in parts and "test" in parts:
            parts[split].drop_texts_of(parts["test"], "also in test")
    train = parts["train"]
    if isinstance(validation, float):
        held = hold_out(train.classes[train.rows], train.texts[train.rows], validation, seed)
        parts["validation"] = Part(train.scan, train.classes, train.texts, train.rows[held])
        train.rows = np.delete(train.rows, held)
    train.drop_texts_of(parts["validation"], "also in validation")
    return {split: parts[split] for split in _SPLITS if split in parts}


def hold_out(classes: Indices, texts: Indices, share: float, seed: int) -> Indices:
    """Positions to hold out of train, rising, stratified by class.

    Of n different texts of a class: share · n rounded half up, at least 1, at most n - 1. Only the first row of a text
    is held out, so that dropping its copies from train does not empty a class. A text with rows of several classes is
    not, nor counted among the n: what is wrong with it is for cleaning to find, which sees all of its rows in train.

    classes, texts  (rows,), equal numbers for equal classes and texts.
    """
    _, first, number = np.unique(texts, return_index=True, return_inverse=True)
    contradicted = np.bincount(number, weights=classes != classes[first][number]) > 0
    agreed, held = first[~contradicted], []
    for class_id in np.unique(classes[agreed]):
        members = np.sort(agreed[classes[agreed] == class_id])
        count = min(len(members) - 1, max(1, int(share * len(members) + 0.5)))
        order = np.random.default_rng([seed, int(class_id)]).permutation(len(members))
        held.append(members[order[:count]])
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *held]))


def _limit(parts: Mapping[str, Part], spec: DataSpec, seed: int, labels: Sequence[str]) -> None:
    limit, least = spec.limit, _LEAST_CLASSES if labels else 1
    for position, (split, part) in enumerate(parts.items()):
        before = _class_count(part)
        if len(part.rows) == 0 or (split == "train" and before < least):
            raise DataError(_emptied(split, part, bool(labels)))
        size = {str(name): size for name, size in limit.items()}.get(split) if isinstance(limit, dict) else limit
        if size is not None and size < len(part.rows):
            generator = np.random.default_rng([seed, position, size])
            part.keep(np.sort(generator.choice(part.rows, size, replace=False)), "limit")
        if _class_count(part) < min(before, least):
            only = labels[part.classes[part.rows[0]]]
            rule = f"leaves rows of one class only ({only!r}) in {split}"
            raise DataError(f"data.limit: {size} {rule}; give a larger limit or leave it out.")


def _class_count(part: Part) -> int:
    return len(np.unique(part.classes[part.rows]))


def _emptied(split: str, part: Part, labelled: bool) -> str:
    left = "no row is" if len(part.rows) == 0 else "one class only is"
    dropped = ", ".join(f"{count} rows {reason}" for reason, count in part.dropped.items()) or "too few rows"
    several = "each class has" if labelled else "there are"
    remedy = f"check that the splits are different files, and that {several} several rows"
    return f"{part.scan.place}: {left} left for {split} ({dropped}); {remedy}."


def _facts(part: Part, labels: Sequence[str]) -> dict[str, Any]:
    counts = np.bincount(part.classes[part.rows], minlength=len(labels))
    classes = {name: int(counts[index]) for index, name in enumerate(labels)}
    broken = {"broken line": part.scan.broken} if part.scan.broken else {}
    return {
        "rows": len(part.rows),
        "dropped": broken | part.dropped,
        "layout": part.scan.layout,
        **({"classes": classes} if labels else {}),
        "duplicates": len(part.rows) - len(np.unique(part.texts[part.rows])),
    }


def _notes(parts: Mapping[str, Part], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    own = [(split, part) for split, part in parts.items() if split == "train" or part.scan is not parts["train"].scan]
    notes = [f"{split}: the layout was found by looking: {part.scan.layout}." for split, part in own if part.scan.found]
    for split, part in own:
        if part.scan.broken:
            notes.append(f"{split}: {part.scan.broken} broken lines skipped: {'; '.join(part.scan.broken_places)}.")
    for split, part in own:
        if part.scan.markup:
            remnants = "remnants of HTML, such as <br /> or #39;; they are kept as they are"
            notes.append(f"{split}: {part.scan.markup} texts hold {remnants}.")
    for split, part in parts.items():
        leaks = ((reason, count) for reason, count in part.dropped.items() if reason.startswith("also"))
        notes += [f"{split}: {count} rows dropped because their text is {reason}." for reason, count in leaks]
    absent = [name for name, count in facts["train"].get("classes", {}).items() if count == 0]
    return [*notes, *(f"train: no row of the class {name!r} is left." for name in absent)]
