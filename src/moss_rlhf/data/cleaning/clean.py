"""Splits → cleaner splits, with everything that was found. The checks are done in order, each on what is left."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data.cleaning.duplicates import conflicting_rows, duplicate_rows
from moss_rlhf.data.cleaning.finding import Finding, Hit, dropped_rows, finding_facts, shorten
from moss_rlhf.data.cleaning.label_errors import fold_fault, suspicious_labels
from moss_rlhf.data.cleaning.markup import mend_markup
from moss_rlhf.data.cleaning.minhash import leaking_rows, near_duplicates
from moss_rlhf.data.cleaning.texts import (
    boilerplate_texts,
    empty_texts,
    foreign_texts,
    language_identifier,
    length_outliers,
    texts_with_markup,
)
from moss_rlhf.data.columns import Column, label_of, text_names
from moss_rlhf.data.splits import Splits
from moss_rlhf.errors import DataError, MachineError, RecipeError
from moss_rlhf.files import digest
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.clean import CHECKS, CleanSpec

Indices = NDArray[np.int64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts → (texts, size) vectors of length 1."""

_VALIDATION_TOO = frozenset({"empty", "duplicates", "conflicts", "near_duplicates", "leaks"})
"""What is dropped from validation as well. The rest says what texts to serve look like: validation must keep them."""
_LATER = {"train": ("test", "validation"), "validation": ("test",), "test": ()}
_ONLY_TRAIN = frozenset({"label_errors"})
_LABELLED = frozenset({"conflicts", "label_errors"})


@dataclass
class Part:
    """A split while it is cleaned: all its texts and labels, where they stand, and which of its rows are left.

    lines   (rows,), of their file;  unit   what these count, "line" or "row".
    """

    name: str
    texts: list[str]
    labels: list[str] | None
    lines: Indices
    unit: str
    left: Indices
    mended: list[int] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        name: str,
        texts: list[str],
        labels: list[str] | None,
        lines: Indices | None = None,
        unit: str = "row",
    ) -> Part:
        """A split of which all rows are left; without lines, rows are counted from 1."""
        rows = np.arange(len(texts))
        return cls(name, texts, labels, rows + 1 if lines is None else lines, unit, rows)

    @property
    def left_texts(self) -> list[str]:
        return [self.texts[row] for row in self.left]

    @property
    def left_labels(self) -> list[str] | None:
        return [self.labels[row] for row in self.left] if self.labels else None


@dataclass(frozen=True)
class Cleaned:
    """`splits` hold what is left; `kept` says which rows of the splits given they were."""

    splits: Splits
    findings: list[Finding]
    kept: dict[str, Indices]


def check_packages(spec: CleanSpec | None, field: str = "data.clean") -> None:
    """MachineError where a check that is on needs a package that is not installed; `field` is where it was asked."""
    for name, packages in (spec.packages if spec else {}).items():
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            raise MachineError(
                f"{field}.{name}: needs the package {missing[0]}, which is not installed. "
                "Install it: pip install 'moss-rlhf[clean]'."
            )


def refuse_rare_classes(spec: CleanSpec | None, classes: Mapping[str, int], field: str = "data.clean") -> None:
    """DataError where confident learning is asked for and a class of train has fewer rows than folds."""
    if spec is None or spec.label_errors == "off" or spec.label_method != "confident":
        return
    if fault := fold_fault(classes, spec.folds):
        raise DataError(f"{field}.{fault}")


def clean_splits(
    splits: Splits, columns: Sequence[Column], spec: CleanSpec, *, seed: int, embed: Embed, progress: Progress
) -> Cleaned:
    """Do the checks that `spec` asks for.

    Rows are dropped from train; from validation where they would be measured twice or can't be answered; never from
    test, whose findings are listed only. Holds the texts of all splits in memory.

    columns   the task's.
    embed     only called where label errors are looked for.
    raises    DataError where a class of train, or all of validation, would go; MachineError on a missing package;
              RecipeError on a check that needs labels where there are none.
    """
    parts = _parts(splits, columns)
    findings = clean_parts(parts, spec, seed=seed, embed=embed, progress=progress)
    return Cleaned(
        _rebuilt(splits, columns, parts, findings), findings, {name: part.left for name, part in parts.items()}
    )


def clean_parts(
    parts: Mapping[str, Part],
    spec: CleanSpec,
    *,
    seed: int,
    embed: Embed,
    progress: Progress,
    field: str = "data.clean",
) -> list[Finding]:
    """Do the checks on the parts, of which `left` and `mended` change; see `clean_splits`.

    parts   {"train": …, and "validation" and "test" where there are any}.
    field   where the checks were asked for, for errors.
    """
    check_packages(spec, field)
    unlabelled = [check for check in spec.checks if check in _LABELLED and parts["train"].labels is None]
    if unlabelled:
        raise RecipeError(f"{field}.{unlabelled[0]}: compares labels, and these rows have none. Leave it out.")
    findings: list[Finding] = []
    for check, action in progress.track(spec.checks.items(), "cleaning", len(spec.checks)):
        if check == "label_errors":
            refuse_rare_classes(spec, Counter(parts["train"].left_labels), field)
        find = _finder(check, spec, parts, seed, embed)
        for name in ("test", "validation", "train"):  # so that a leak's partner is one that stays
            if name in parts and not (check in _ONLY_TRAIN and name != "train"):
                findings += _apply(check, action, find(parts[name]), parts, name)
    findings.sort(key=lambda finding: (list(parts).index(finding.split), CHECKS.index(finding.check), finding.line))
    _refuse_emptied(parts, findings, field)
    return findings


def _parts(splits: Splits, columns: Sequence[Column]) -> dict[str, Part]:
    present = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: _part(name, rows, columns, splits) for name, rows in present.items() if rows is not None}


def _part(name: str, rows: Any, columns: Sequence[Column], splits: Splits) -> Part:
    texts = [" ".join(cells) for cells in zip(*(rows[column][:] for column in text_names(columns)), strict=True)]
    label, origin = label_of(columns), splits.origins.get(name)
    labels = [splits.labels[class_id] for class_id in rows[label]] if label in rows.column_names else None
    return Part.of(name, texts, labels, *(() if origin is None else (origin.lines, origin.unit)))


Find = Callable[[Part], list[Hit]]
"""Hits by position among the part's rows that are left; a partner's too."""


def _finder(check: str, spec: CleanSpec, parts: Mapping[str, Part], seed: int, embed: Embed) -> Find:
    """The function that looks through a part for one check."""
    train = parts["train"].left_texts
    if check == "language":
        identify = language_identifier()
        return lambda part: foreign_texts(part.left_texts, train, identify)
    finders: Mapping[str, Find] = {
        "empty": lambda part: empty_texts(part.left_texts, spec.min_letters),
        "markup": lambda part: texts_with_markup(part.left_texts),
        "duplicates": lambda part: duplicate_rows(part.name, part.left_texts, part.left_labels),
        "conflicts": lambda part: conflicting_rows(part.name, part.left_texts, part.left_labels or []),
        "near_duplicates": lambda part: near_duplicates(part.name, part.left_texts, part.left_labels, spec.threshold),
        "leaks": lambda part: leaking_rows(
            part.left_texts,
            {name: parts[name].left_texts for name in _LATER[part.name] if name in parts},
            spec.threshold,
        ),
        "boilerplate": lambda part: boilerplate_texts(part.left_texts, spec.boilerplate_rows, train),
        "length": lambda part: length_outliers(part.left_texts, train),
        "label_errors": lambda part: _label_errors(part, spec, seed, embed),
    }
    return finders[check]


def _label_errors(part: Part, spec: CleanSpec, seed: int, embed: Embed) -> list[Hit]:
    vectors, labels = embed(part.left_texts), part.left_labels or []
    return suspicious_labels(
        vectors, labels, method=spec.label_method, support=spec.label_support, folds=spec.folds, seed=seed
    )


def _apply(check: str, action: str, hits: Sequence[Hit], parts: Mapping[str, Part], split: str) -> list[Finding]:
    """Note what was found in a part, and take out of it, or mend, what the action says."""
    part = parts[split]
    done = {hit: _action(check, action, split, hit) for hit in hits}
    findings = [_finding(check, done[hit], hit, parts, part) for hit in hits]
    gone = [hit.row for hit in hits if done[hit] == "drop"]
    mended = [int(part.left[hit.row]) for hit in hits if done[hit] == "mend"]
    for row in mended:
        part.texts[row] = _mended(part.texts[row])
    part.mended += mended
    part.left = np.delete(part.left, gone)
    return findings


def _action(check: str, action: str, split: str, hit: Hit) -> str:
    if not hit.certain or split == "test":
        return "flag"
    return action if split == "train" or (action == "drop" and check in _VALIDATION_TOO) else "flag"


def _finding(check: str, action: str, hit: Hit, parts: Mapping[str, Part], part: Part) -> Finding:
    row = int(part.left[hit.row])
    label = part.labels[row] if part.labels else ""
    partner = _place(parts[hit.partner[0]], hit.partner[1]) if hit.partner else ""
    return Finding(part.name, check, action, int(part.lines[row]), label, hit.reason, partner, shorten(part.texts[row]))


def _place(part: Part, row: int) -> str:
    return f"{part.name} {part.unit} {part.lines[part.left[row]]}"


# --- what is left --------------------------------------------------------------------------------------------------


def _refuse_emptied(parts: Mapping[str, Part], findings: Sequence[Finding], field: str) -> None:
    train = parts["train"]
    gone = ", ".join(f"{count} rows by {check}" for check, count in dropped_rows(findings, "train").items())
    remedy = "Set the check that drops most to flag, and look at what it finds"
    lost = sorted(set(train.labels or []) - set(train.left_labels or []))
    if lost:
        raise DataError(f"{field}: would leave no row of the class {lost[0]!r} in train (dropped: {gone}). {remedy}.")
    for name, part in parts.items():
        if len(part.left) == 0:
            raise DataError(f"{field}: would leave no row in {name} of {len(part.texts)}. {remedy}.")


def _rebuilt(
    splits: Splits, columns: Sequence[Column], parts: Mapping[str, Part], findings: Sequence[Finding]
) -> Splits:
    rows = {name: kept_rows(getattr(splits, name), part, text_names(columns)) for name, part in parts.items()}
    origins = {
        name: dataclasses.replace(origin, lines=origin.lines[parts[name].left])
        for name, origin in splits.origins.items()
    }
    facts = {name: splits.facts[name] | _facts(part, findings, splits.facts[name]) for name, part in parts.items()}
    return dataclasses.replace(
        splits,
        train=rows["train"],
        validation=rows["validation"],
        test=rows.get("test"),
        facts=facts,
        notes=(*splits.notes, *_notes(parts, findings)),
        digest=digest([splits.digest, *(_part_digest(part) for part in parts.values())]),
        origins=origins,
    )


def kept_rows(rows: Any, part: Part, texts: Sequence[str]) -> Any:
    """Of a list of mappings or a data set the rows that are left, mended where they were; other columns stay.

    texts   the names of the text columns.
    """
    mended = set(part.mended)

    def mend(row: Mapping[str, Any], position: int) -> dict[str, Any]:
        return dict(row) | ({column: _mended(row[column]) for column in texts} if position in mended else {})

    if isinstance(rows, Sequence):
        return [mend(rows[row], row) for row in part.left.tolist()]
    if mended:
        rows = rows.map(
            mend, with_indices=True, keep_in_memory=True, load_from_cache_file=False, new_fingerprint=_part_digest(part)
        )
    return rows.select(part.left)


def _mended(text: str) -> str:
    return mend_markup(text) or text


def _part_digest(part: Part) -> str:
    changed = hashlib.sha256("\x1f".join(part.texts[row] for row in part.mended).encode()).hexdigest()
    return digest([part.name, hashlib.sha256(part.left.tobytes()).hexdigest(), part.mended and changed])[:32]


def _facts(part: Part, findings: Sequence[Finding], before: Mapping[str, Any]) -> dict[str, Any]:
    facts = {
        "rows": len(part.left),
        "dropped": before["dropped"] | dict(dropped_rows(findings, part.name)),
        "duplicates": len(part.left) - len({text.strip() for text in part.left_texts}),
        "findings": finding_facts(findings, part.name),
    }
    if part.labels is None or "classes" not in before:
        return facts
    labels = part.left_labels or []
    return facts | {"classes": {name: labels.count(name) for name in before["classes"]}}


def _notes(parts: Mapping[str, Part], findings: Sequence[Finding]) -> list[str]:
    """A sentence a split: how many rows each check dropped, mended or flagged."""
    notes = []
    for split in parts:
        counts: dict[tuple[str, str], int] = {}
        for finding in findings:
            if finding.split == split:
                counts[finding.action, finding.check] = counts.get((finding.action, finding.check), 0) + 1
        said = ", ".join(f"{_DONE[action]} {count} ({check})" for (action, check), count in counts.items())
        notes += [f"{split}: data.clean {said}; findings.csv lists them."] if said else []
    return notes


_DONE = {"drop": "dropped", "flag": "flagged", "mend": "mended"}
