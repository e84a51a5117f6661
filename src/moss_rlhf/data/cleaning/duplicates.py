"""Equal texts of one split: the same label again, or another one. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moss_rlhf.data.cleaning.finding import Hit


def duplicate_rows(split: str, texts: Sequence[str], labels: Sequence[str] | None) -> list[Hit]:
    """Every row but the first of the same text and label; white space at the ends does not count."""
    first: dict[tuple[str, str], int] = {}
    hits = []
    for row, text in enumerate(texts):
        earlier = first.setdefault((text.strip(), labels[row] if labels else ""), row)
        if earlier != row:
            hits.append(Hit(row, "the same text and label" if labels else "the same text", (split, earlier)))
    return hits


def conflicting_rows(split: str, texts: Sequence[str], labels: Sequence[str]) -> list[Hit]:
    """Rows of a text that stands under several labels. Certain: all but those of the label that has the majority.

    No label has it where two have equally many rows: then all are certain.
    """
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text.strip(), []).append(row)
    return sorted((hit for group in rows.values() for hit in _conflict(split, group, labels)), key=lambda hit: hit.row)


def _conflict(split: str, rows: Sequence[int], labels: Sequence[str]) -> list[Hit]:
    counts = Counter(labels[row] for row in rows)
    if len(counts) == 1:
        return []
    (first, most), (_, second), *_ = counts.most_common()
    majority = first if most > second else None
    shown = ", ".join(f"{count} × {label}" for label, count in sorted(counts.items()))
    partners = {label: next(row for row in rows if labels[row] != label) for label in counts}
    return [
        Hit(
            row,
            f"the same text under different labels: {shown}",
            (split, partners[labels[row]]),
            labels[row] != majority,
        )
        for row in rows
    ]
