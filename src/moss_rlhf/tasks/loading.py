"""Models and rows for a task: what needs torch, which the rest of this room does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_rlhf.data.labels import label_name
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.checkpoint import Model, load_checkpoint, load_pretrained, refuse_no_model
from moss_rlhf.model.config import KEY, read_config, refuse_foreign_grid, trained_labels
from moss_rlhf.model.locate import locate
from moss_rlhf.tasks import TASKS, TextClassification, usual_task

_LEAST_CLASSES = 2


def load(
    path: str | Path, labels: Sequence[str] | None = None, task: str | None = None, *, offload: bool = False
) -> Model:
    """Load a checkpoint, whatever shapes moss-rlhf gave it: `.network`, `.tokenizer`, `.task`.

    path     a directory or a hub id.
    labels   names in class-id order, to start from a pretrained model whose head is yet to be trained.
    task     its name; else what the checkpoint says, or what its family serves: classification with an encoder,
             generation with a decoder, translation with an encoder-decoder.
    offload  leave the weights on disk, so that a checkpoint larger than memory can be pruned, quantized and saved, a
             block at a time. Its head must be a trained one.
    raises   ModelError where it is missing or broken.
    """
    place = locate(str(path))
    config = read_config(place)
    refuse_foreign_grid(config, place)
    name = task or config.get(KEY, {}).get("task") or usual_task(config)
    auto_class = TASKS[name].auto_class()
    if offload:
        if TASKS[name].has_classes and (labels is not None or trained_labels(config) is None):
            raise ModelError(
                f"{place}: offload leaves the weights on disk, and a trained head must be among them. Load it whole, "
                "fine-tune and save it first."
            )
        model = load_checkpoint(place, auto_class, offload=True)
        model.task = name
        return model
    if labels is None and KEY in config:
        return load_checkpoint(place, auto_class)
    if not TASKS[name].has_classes:
        return load_pretrained(place, name, auto_class, None)
    names = trained_labels(config) if labels is None else label_names(labels)
    if names is None:
        raise ModelError(
            f"{place}: its head was never trained for {name}. Give the class names to start from it: "
            "load(path, labels=['negative', 'positive'])."
        )
    return load_pretrained(place, name, auto_class, names)


def label_names(labels: Sequence[object]) -> tuple[str, ...]:
    """Labels as a head names its classes, in class-id order: 1, 1.0 and "1" are all '1'.

    raises   DataError where they are fewer than two, not all different, or no names.
    """
    given = () if isinstance(labels, str) else tuple(labels)
    names = tuple(label_name(label) if isinstance(label, str | int | float) else "" for label in given)
    if len(names) < _LEAST_CLASSES or len(set(names)) < len(names) or "" in names:
        raise DataError(f"labels: {labels!r} can't be used; give two names or more, all different: ['no', 'yes'].")
    return names


def encoded(model: Model, rows: Any, max_length: int | None = None, *, judged: bool = False) -> Any:
    """Rows as the methods take them: tokenized, where they are not yet.

    rows     a datasets.Dataset, or a list of mappings, with the task's columns; labels as names or class ids.
    max_length   tokens of a row; else as the model was trained; else as many as it has positions for, of a language
                 model no more than 1024.
    judged   whether answers are to be held against labels, which must be there then.
    raises   DataError where there are no rows, a text column or the labels are missing, or on a label that the model
             does not know.
    """
    refuse_no_model(model, "rows")
    ready = _encoded(model, rows, max_length)
    if judged and TASKS[model.task].has_classes and "labels" not in ready.column_names:
        raise DataError("rows: they have no column 'label', and answers are held against it. Give rows with labels.")
    return ready


def _encoded(model: Model, rows: Any, max_length: int | None) -> Any:
    _refuse_type(rows)
    if not isinstance(rows, Sequence) and "input_ids" in rows.column_names:
        return rows
    task = TASKS[model.task]
    usual = task.longest("auto", model.max_length)
    if model.cut is not None and isinstance(task, TextClassification):
        length = max_length or min(model.cut.max_length, model.max_length)
        return task.encode(_dataset(model, rows), model.tokenizer, length, keep=model.cut.keep)
    return task.encode(_dataset(model, rows), model.tokenizer, max_length or usual)


def _refuse_type(rows: Any) -> None:
    """DataError on what is no list of mappings and no datasets.Dataset."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        return
    several = rows if isinstance(rows, list | tuple) else ()
    wrong = next((f" of {type(row).__name__}" for row in several if not isinstance(row, Mapping)), "")
    if wrong or not isinstance(rows, list | tuple):
        raise DataError(
            f"rows: a {type(rows).__name__}{wrong} can't be read. Give a list of mappings, such as "
            "[{'text': …, 'label': …}], or a datasets.Dataset."
        )


def _dataset(model: Model, rows: Any) -> Any:
    if not len(rows):
        raise DataError("rows: there are none. Give at least one, with the columns of the task.")
    texts = [column.name for column in TASKS[model.task].columns if column.kind == "text"]
    if isinstance(rows, Sequence):
        return _from_list(model, rows, texts)
    _refuse_missing(model, rows.column_names, texts)
    if "label" not in rows.column_names or not TASKS[model.task].has_classes:
        return rows
    ids = [_class_id(model, label) for label in rows["label"]]
    return rows.remove_columns("label").add_column("label", ids)


def _from_list(model: Model, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> Any:
    """Arrow wants one type a column: names and class ids may stand side by side in a list."""
    from datasets import Dataset

    _refuse_missing(model, list(rows[0]), texts)
    for number, row in enumerate(rows, 1):
        for name in texts:
            if not isinstance(row.get(name), str):
                raise DataError(f"rows: row {number}: {name} is {row.get(name)!r}; it must be a text.")
    if "label" not in rows[0] or not TASKS[model.task].has_classes:
        return Dataset.from_list(list(rows))
    return Dataset.from_list([{**row, "label": _class_id(model, row.get("label"))} for row in rows])


def _refuse_missing(model: Model, columns: Sequence[str], texts: Sequence[str]) -> None:
    if missing := [name for name in texts if name not in columns]:
        raise DataError(
            f"rows: there is no column {missing[0]!r}; {model.task} needs {' and '.join(texts)}, and the columns are "
            f"{', '.join(map(str, columns)) or '(none)'}. Rename one."
        )


def _class_id(model: Model, label: object) -> int:
    if isinstance(label, str) and label in model.labels:
        return model.labels.index(label)
    if isinstance(label, int | float) and not isinstance(label, bool) and label in range(len(model.labels)):
        return int(label)
    raise DataError(
        f"rows: the label {label!r} is not one of {', '.join(model.labels)}, nor a class id below {len(model.labels)}. "
        "Give labels as the model names them."
    )
