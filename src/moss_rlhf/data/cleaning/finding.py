"""What a check found: a row, the reason, and of a duplicate its partner; listed for people, counted for the report."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.files import new_file

_SHOWN = 50
_TEXT_SHOWN = 120


@dataclass(frozen=True)
class Hit:
    """A row that a check objects to, by its position among the rows it was given.

    partner   (split, position) of the row that it is compared with
    certain   whether the check would drop it; what is not certain is listed only
    """

    row: int
    reason: str
    partner: tuple[str, int] | None = None
    certain: bool = True


@dataclass(frozen=True)
class Finding:
    """A hit in a file: what people look up.

    line     of the row in its file, as an editor counts; a row number in formats without lines
    action   "flag", "drop" or "mend": what was done
    partner  "train line 12", or ""
    """

    split: str
    check: str
    action: str
    line: int
    label: str
    reason: str
    partner: str
    text: str


def shorten(text: str, most: int = _TEXT_SHOWN) -> str:
    """A text on one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def finding_facts(findings: Iterable[Finding], split: str) -> dict[str, Any]:
    """{check: {"count", "actions": {action: rows}, "examples": the first 50}} of one split."""
    by_check: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.split == split:
            by_check.setdefault(finding.check, []).append(finding)
    return {
        check: {
            "count": len(found),
            "actions": dict(sorted(Counter(finding.action for finding in found).items())),
            "examples": [_example(finding) for finding in found[:_SHOWN]],
        }
        for check, found in by_check.items()
    }


def _example(finding: Finding) -> dict[str, Any]:
    names = ("line", "label", "action", "reason", "partner", "text")
    return {name: getattr(finding, name) for name in names}


def write_findings(findings: Sequence[Finding], place: Path) -> None:
    """All findings as a csv file with a header."""
    names = list(Finding.__dataclass_fields__)
    with new_file(place) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([getattr(finding, name) for name in names] for finding in findings)


def dropped_rows(findings: Iterable[Finding], split: str) -> Mapping[str, int]:
    """{check: rows dropped} of one split."""
    return Counter(finding.check for finding in findings if finding.split == split and finding.action == "drop")
