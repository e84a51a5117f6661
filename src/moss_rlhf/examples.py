"""Answers as the report shows them: where before and after differ, on the texts themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from moss_rlhf.evaluation import ClassAnswers, TokenAnswers, WrittenAnswers, changed, confusion_of, moved, rewritten

_SHOWN = 20
_LARGEST_LOSS = 700.0  # exp of more is no float64


def confusions(before: ClassAnswers | None, after: ClassAnswers, labels: Sequence[str]) -> dict[str, Any]:
    first = confusion_of(before) if before else None
    return {"confusion": {"labels": list(labels), "before": first, "after": confusion_of(after)}}


def changed_examples(
    before: ClassAnswers | None, after: ClassAnswers, labels: Sequence[str], texts: Any
) -> dict[str, Any]:
    """The texts whose answer changed, with the names of their label and of both answers."""
    if before is None:
        return {"changed": [], "changed_total": 0}
    rows, total = changed(before, after, _SHOWN)
    return {
        "changed": [
            {
                "text": texts[row]["text"],
                "label": labels[after.labels[row]],
                "before": labels[before.ids[row]],
                "after": labels[after.ids[row]],
            }
            for row in rows
        ],
        "changed_total": total,
    }


def moved_examples(before: TokenAnswers, after: TokenAnswers, rows: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows whose perplexity moved the most. Rows are pieces of documents, so they are decoded, not looked up."""
    found = []
    for row in moved(before, after, _SHOWN):
        tokens = rows[row].get("labels") or rows[row]["input_ids"]  # of a pair, what was to be foretold
        perplexities = {"before": before.losses[row], "after": after.losses[row]}
        found.append(
            {"text": tokenizer.decode(tokens, skip_special_tokens=True)}
            | {side: math.exp(min(float(loss), _LARGEST_LOSS)) for side, loss in perplexities.items()}
        )
    return found


def rewritten_examples(before: WrittenAnswers, after: WrittenAnswers, texts: Any) -> list[dict[str, str]]:
    """Sources, their targets and both translations where they differ the most. texts: the rows, of both."""
    return [
        {name: texts[int(row)][name] for name in ("source", "target")}
        | {"before": before.texts[row], "after": after.texts[row]}
        for row in rewritten(before, after, _SHOWN)
    ]
