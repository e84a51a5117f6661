"""Copies of training rows, changed: the driver over a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moss_rlhf.errors import RecipeError, nearest
from moss_rlhf.files import digest
from moss_rlhf.strategy.augmentation.applying import (
    Operation,
    Rewriting,
    WordOperation,
    augment_answerable,
    change_text,
)
from moss_rlhf.strategy.augmentation.draws import Draws, key_of

if TYPE_CHECKING:
    from datasets import Dataset

_AT_ONCE = 1000  # rows: what a model's batches of similar lengths are cut from
_EXAMPLES = 5
_CHARACTERS_SHOWN = 300
Combine = Literal["one", "all"]
Row = dict[str, Any]

_NOISE = frozenset({"typo", "keyboard", "punctuation"})
_MEANING = _NOISE | {"synonym", "back_translation"}
_WORDS = _NOISE | {"synonym", "insert", "swap", "delete"}
ALLOWED: Mapping[str, Mapping[str, frozenset[str]]] = {
    "text-classification": {"text": _WORDS | {"masked_lm", "back_translation"}},
    "text-generation": {"text": frozenset({"back_translation"})},
    "translation": {"source": _MEANING},
    "question-answering": {"context": _WORDS, "question": _MEANING},
}
"""{task: {column: the operations that leave the row's answer true}}; a target or an answer is never changed."""


def augment_rows(
    rows: Dataset | Sequence[Mapping[str, Any]],
    operations: Sequence[Operation],
    *,
    copies: int = 1,
    seed: int = 0,
    task: str = "text-classification",
    combine: Combine = "one",
) -> Dataset:
    """The rows, and behind them `copies` changed copies of each, labels as they were.

    What a copy becomes depends on (seed, number of the copy, position of the row) alone, but for masked_lm, whose
    probabilities differ in their last bits with the batch, and sampled back_translation, drawn a batch at a time.

    operations   from `word_operations`, `Rewriting("masked_lm", …)`, `Rewriting("back_translation", …)`.
    task         says which columns are changed by which operations, see `ALLOWED`. Question answering wants SQuAD's
                 columns: `context`, `question`, `answers` with `text` and `answer_start`.
    combine      'one': each copy is made by one of the operations, drawn for each row (as in EDA); where it finds
                 nothing to change, the next one. 'all': by all of them in turn.
    raises       RecipeError where an operation does not leave the task's answers true, or there are to be no copies.
    """
    from datasets import Dataset, concatenate_datasets

    if copies < 1:
        raise RecipeError(f"augment.copies: {copies} can't be used; it must be at least 1.")
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    made = [
        make_copy(rows, operations, number=number, seed=seed, task=task, combine=combine)
        for number in range(1, copies + 1)
    ]
    return concatenate_datasets([rows, *made])


def make_copy(
    rows: Dataset,
    operations: Sequence[Operation],
    *,
    number: int,
    seed: int,
    task: str = "text-classification",
    combine: Combine = "one",
    cache_file: Path | None = None,
) -> Dataset:
    """One changed copy of all rows, the `number`-th; in `cache_file`, from where it is taken if it stands there."""
    allowed = check_task([operation.name for operation in operations], task)
    key = key_of(seed, number)

    def change(batch: Mapping[str, list[Any]], positions: list[int]) -> dict[str, list[Any]]:
        every = [dict(zip(batch, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        draws = [Draws(key_of(key, position)) for position in positions]
        changed = change_rows(every, operations, draws, allowed, combine)
        return {name: [row[name] for row in changed] for name in batch}

    names = [[operation.name, getattr(operation, "rate", None)] for operation in operations]
    return rows.map(
        change,
        batched=True,
        batch_size=_AT_ONCE,
        with_indices=True,
        features=rows.features,
        cache_file_name=None if cache_file is None else str(cache_file),
        load_from_cache_file=cache_file is not None,
        # the name of a function's bytes is no name of its meaning
        new_fingerprint=digest([rows._fingerprint, names, seed, number, task, combine])[:32],
        desc=None,
    )


def check_task(names: Sequence[str], task: str) -> Mapping[str, frozenset[str]]:
    """{column: operations that may change it} of a task; RecipeError on one that would make its answers wrong."""
    if task not in ALLOWED:
        raise RecipeError(f"data.augment: rows of {task} can't be augmented; {nearest(task, ALLOWED)}")
    fitting = frozenset().union(*ALLOWED[task].values())
    if wrong := [name for name in names if name not in fitting]:
        raise RecipeError(
            f"data.augment.{wrong[0]}: would make the answers of {task} wrong. Give some of "
            f"{', '.join(sorted(fitting))}, or leave data.augment out."
        )
    return ALLOWED[task]


def change_rows(
    rows: Sequence[Row],
    operations: Sequence[Operation],
    draws: Sequence[Draws],
    allowed: Mapping[str, frozenset[str]],
    combine: Combine,
) -> list[Row]:
    """The rows changed, models first (they want clean texts), then words and characters."""
    plans = [_plan(operations, own, combine) for own in draws]
    changed = [dict(row) for row in rows]
    for operation in operations:
        if isinstance(operation, Rewriting):
            mine = [place for place, plan in enumerate(plans) if operation in (plan if combine == "all" else plan[:1])]
            _rewrite(changed, mine, operation, draws, allowed)
    return [
        row if combine == "one" and isinstance(plan[0], Rewriting) else _change_row(row, plan, own, allowed, combine)
        for row, plan, own in zip(changed, plans, draws, strict=True)
    ]


def _plan(operations: Sequence[Operation], draws: Draws, combine: Combine) -> Sequence[Operation]:
    """The operations in the order in which a row tries them."""
    if combine == "all" or len(operations) == 1:
        return operations
    first = draws.below(len(operations))
    return [*operations[first:], *operations[:first]]


def _rewrite(
    rows: Sequence[Row],
    mine: Sequence[int],
    operation: Rewriting,
    draws: Sequence[Draws],
    allowed: Mapping[str, frozenset[str]],
) -> None:
    for column in (name for name, names in allowed.items() if operation.name in names and mine):
        texts = operation.rewrite([rows[place][column] for place in mine], [draws[place] for place in mine])
        for place, text in zip(mine, texts, strict=True):
            rows[place][column] = text


def _change_row(
    row: Row, plan: Sequence[Operation], draws: Draws, allowed: Mapping[str, frozenset[str]], combine: Combine
) -> Row:
    words = [operation for operation in plan if isinstance(operation, WordOperation)]
    if combine == "all":
        return _apply(row, words, draws, allowed)
    for operation in words:
        changed = _apply(row, [operation], draws, allowed)
        if changed != row:
            return changed
    return row


def _apply(row: Row, operations: Sequence[WordOperation], draws: Draws, allowed: Mapping[str, frozenset[str]]) -> Row:
    if "context" in allowed:
        return _apply_around_answers(row, operations, draws, allowed["question"])
    fitting = {
        name: [operation for operation in operations if operation.name in names] for name, names in allowed.items()
    }
    return row | {name: change_text(row[name], own, draws) for name, own in fitting.items()}


def _apply_around_answers(
    row: Row, operations: Sequence[WordOperation], draws: Draws, in_question: frozenset[str]
) -> Row:
    given = row["answers"]
    answers = list(zip(given["answer_start"], given["text"], strict=True))
    made = augment_answerable(row["context"], row["question"], answers, operations, draws, in_question)
    starts = [answer.start for answer in made.answers]
    return row | {"context": made.context, "question": made.question, "answers": given | {"answer_start": starts}}


def augmentation_facts(rows: Dataset, copies: Sequence[Dataset], task: str) -> dict[str, Any]:
    """How many rows were made, how many of them say what their original says, and the first that differ."""
    columns = list(ALLOWED[task])
    unchanged, examples = 0, list[dict[str, Any]]()
    for copy in copies:
        for row, changed in _pairs(rows, copy, columns):
            unchanged += row == changed
            if row != changed and len(examples) < _EXAMPLES:
                examples.append({"original": _shown(row), "copy": _shown(changed)})
    return {"rows": sum(map(len, copies)), "unchanged": unchanged, "examples": examples}


def _pairs(rows: Dataset, copy: Dataset, columns: Sequence[str]) -> Any:
    """Each row's changed columns beside its copy's, from the file, a thousand at a time."""
    for start in range(0, len(rows), _AT_ONCE):
        ours, theirs = (data[start : start + _AT_ONCE] for data in (rows, copy))
        yield from zip(*(zip(*(part[name] for name in columns), strict=True) for part in (ours, theirs)), strict=True)


def _shown(texts: Sequence[str]) -> str:
    return " | ".join(texts)[:_CHARACTERS_SHOWN]
