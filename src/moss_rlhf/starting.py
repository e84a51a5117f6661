"""What the command line does around a run: a first recipe, one measurement, one export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moss_rlhf.data import open_splits, sniff
from moss_rlhf.errors import MachineError, RecipeError, nearest
from moss_rlhf.recipe import DataSpec, apply_override, make_recipe
from moss_rlhf.tasks import TASKS

_HEAD = """\
# Paths are relative to where you call moss. `moss check` tells what this will take; `moss run` does it.
"""
_LEARN: dict[str, Any] = {"epochs": 3, "learning_rate": 5e-5, "layer_decay": 0.9, "early_stopping": {"patience": 2}}
_RECOVER: dict[str, Any] = {"epochs": 4, "learning_rate": 1e-4, "distill": {"teacher": "parent"}}


@dataclass(frozen=True)
class _Start:
    """What a first recipe for a task begins with; `removed`: of heads and feed-forward. Language models bear less."""

    model: str
    export: str
    removed: float

    @property
    def stages(self) -> list[dict[str, Any]]:
        narrow = {"heads": self.removed, "feed_forward": self.removed}
        return [{"finetune": _LEARN}, {"narrow": narrow}, {"finetune": _RECOVER}, {"quantize": {"scheme": "int8"}}]


_STARTS: Mapping[str, _Start] = {
    "text-classification": _Start("sentence-transformers/all-MiniLM-L6-v2", "onnx", 0.5),
    "text-generation": _Start("openai-community/gpt2", "ctranslate2", 0.25),
    "translation": _Start("Helsinki-NLP/opus-mt-en-de", "ctranslate2", 0.25),
}


def starting_recipe(
    task: str,
    model: str | None,
    train: Path,
    test: Path | None,
    target: Path | None = None,
    test_target: Path | None = None,
) -> str:
    """A recipe for a data file, as YAML: its columns found out, a fine-tuning, a compression, a recovery, int8.

    model                 None: a usual one for the task.
    target, test_target   translation: files with the targets of the lines of `train` and `test`.
    raises                RecipeError on an unknown task, or targets for another; DataError where the file's columns
                          can't be told.
    """
    if task not in TASKS:
        raise RecipeError(f"--task {task}: unknown task; {nearest(task, TASKS)}")
    start = _STARTS[task]
    recipe = {
        "task": task,
        "model": model or start.model,
        "data": _data_section(task, train, test, target, test_target) | {"validation": 0.1},
        "stages": start.stages,
        "export": [start.export],
        "output": f"runs/{train.name.split('.')[0]}",
    }
    return _HEAD + yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)


def _data_section(
    task: str, train: Path, test: Path | None, target: Path | None, test_target: Path | None
) -> dict[str, Any]:
    given = target is not None or test_target is not None
    if given and (task != "translation" or target is None or (test is None) != (test_target is None)):
        raise RecipeError("--target: is for translation, and goes with --test-target where --test is given.")
    if TASKS[task].has_classes:
        data = sniff(train).data_section()
        if test is not None:
            data["test"] = data["train"] | {"file": str(test)} if isinstance(data["train"], dict) else str(test)
        return data
    sources = {"train": (train, target)} | ({} if test is None else {"test": (test, test_target)})
    data = {
        split: {"files": {"source": str(file), "target": str(other)}} if other else str(file)
        for split, (file, other) in sources.items()
    }
    open_splits(DataSpec(**data), TASKS[task].columns)  # says what is wrong with them
    return data


def evaluate_file(path: Path, data: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a checkpoint on one file with its task's columns.

    overrides   `data.test.…=value` strings, as in a recipe: how to read the file.
    raises      RecipeError on an override that says nothing of the data; DataError, ModelError.
    """
    from moss_rlhf.data import load_rows
    from moss_rlhf.evaluation import evaluate
    from moss_rlhf.progress import quiet_libraries
    from moss_rlhf.tasks.loading import load

    spec = _data_spec(data, overrides)
    quiet_libraries()
    model = load(path)
    return evaluate(model, load_rows(spec, TASKS[model.task].columns, model.labels))


def _data_spec(file: Path, overrides: Sequence[str]) -> DataSpec:
    """A recipe's data section whose test split is the file."""
    values: dict[str, Any] = {"data": {"train": str(file), "test": {"file": str(file)}}}
    for override in overrides:
        if not override.startswith("data."):
            raise RecipeError(
                f"--set {override}: only the data can be set here, such as data.test.columns.text=review."
            )
        apply_override(values, override)
    whole = {**values, "task": next(iter(TASKS)), "model": "model", "stages": ["finetune"]}
    return make_recipe(whole, "--set").data


def export_checkpoint(path: Path, output: Path, format: str = "auto") -> dict[str, Any]:
    """Write a checkpoint in a runtime's format to a directory that is not there yet, or is empty.

    raises   MachineError where something is there.
    """
    from moss_rlhf.exporting import export
    from moss_rlhf.progress import quiet_libraries
    from moss_rlhf.tasks.loading import load

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise MachineError(f"{output}: is there already. Give the path of a new directory; nothing is overwritten.")
    quiet_libraries()
    return export(load(path), output, format=format)
