"""Whether the model can go through the stages, and the disk hold what they leave. No torch."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss_rlhf.checking.exports import check_compressed_tensors, check_ctranslate2, check_export, check_scheme
from moss_rlhf.checking.fields import training_of
from moss_rlhf.checking.network import initial_state
from moss_rlhf.checking.shapes import state_after
from moss_rlhf.checking.source import named
from moss_rlhf.checking.teachers import ARTICLES, layer_count
from moss_rlhf.checking.trainings import check_finetuning, check_pretraining
from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import MachineError, ModelError, RecipeError, nearest
from moss_rlhf.files import read_json
from moss_rlhf.model.anatomy import FAMILIES, family_of
from moss_rlhf.model.config import KEY, read_config, refuse_foreign_grid
from moss_rlhf.model.locate import read_header, weight_files
from moss_rlhf.model.vocabulary import KINDS
from moss_rlhf.recipe import (
    EnsembleSpec,
    PretrainSpec,
    QuantizeSpec,
    Recipe,
    TrimVocabularySpec,
    stage_kind,
    stage_spec,
)
from moss_rlhf.rundir import refuse_foreign
from moss_rlhf.tasks import TASKS

_CHECKPOINT_BYTES = 28  # a parameter's share of two resume states (weights and two moments) and the best weights


def check_stages(recipe: Recipe, place: Path) -> None:
    """Whether the model can go through the stages: something to remove, something left, a teacher that is one."""
    config = read_config(place)
    family = family_of(config["model_type"])
    _check_family(recipe, config)
    check_export(recipe)
    _check_search(recipe)
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    refuse_foreign_grid(config, place)
    state = initial_state(place, config, recipe.task, labels=2)
    depths: list[int] = []  # as each stage finds it
    quantized = config.get(KEY, {}).get("quantization")
    for index, stage in enumerate(recipe.stages):
        field, spec = f"stages.{index}.{stage_kind(stage)}", stage_spec(stage)
        depths.append(layer_count(state.shapes, config))
        if quantized:
            raise ModelError(f"{field}: {place} is quantized already; give the checkpoint from before quantization.")
        state = state_after(spec, state, field, config)
        if isinstance(spec, QuantizeSpec):
            check_scheme(spec.scheme, recipe.export, family.kind, field)
        if isinstance(spec, TrimVocabularySpec):
            _check_trimming(spec, place, config, field)
        if isinstance(spec, EnsembleSpec) and not TASKS[recipe.task].has_classes:
            raise RecipeError(
                f"{field}: members are combined by the probabilities of classes, and {recipe.task} has none. Leave it "
                "out."
            )
        if training_of(spec):
            check_finetuning(recipe, index, state.shapes, depths, place)
        if isinstance(spec, PretrainSpec):
            check_pretraining(recipe, index, config, field)
    if "compressed-tensors" in recipe.export:
        check_compressed_tensors(recipe, state, config)
    if "ctranslate2" in recipe.export:
        check_ctranslate2(state, config)


def _check_family(recipe: Recipe, config: dict[str, Any]) -> None:
    """A task is served by one kind of network."""
    kind, task = family_of(config["model_type"]).kind, TASKS[recipe.task]
    if kind == task.families:
        return
    fitting = ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind == task.families))
    other = next(name for name, served in TASKS.items() if served.families == kind)
    raise ModelError(
        f"model: {named(recipe)} is {ARTICLES[kind]} ({config['model_type']}), and {recipe.task} takes "
        f"{ARTICLES[task.families]}: {fitting}. Give one of these, or set task: {other}."
    )


def _check_trimming(spec: TrimVocabularySpec, place: Path, config: dict[str, Any], field: str) -> None:
    """Whether there is a tokenizer that can be cut, and what it shall be cut by."""
    for file in spec.corpora:
        read_texts(file, f"{field}.corpora", limit=1)
    tokenizer = place / "tokenizer.json"
    if not tokenizer.exists() and config["model_type"] == "marian":
        raise ModelError(f"{field}: Marian's tokenizer has no tokenizer.json and can't be cut. Leave this stage out.")
    kind = read_json(tokenizer)["model"]["type"] if tokenizer.exists() else KINDS[0]
    if kind not in KINDS:
        raise ModelError(
            f"{field}: the tokenizer is of the kind {kind}; {', '.join(KINDS)} can be cut. Leave this stage out."
        )


def _check_search(recipe: Recipe) -> None:
    known = TASKS[recipe.task].metrics
    if recipe.search and recipe.search.metric is not None and recipe.search.metric not in known:
        raise RecipeError(
            f"search.metric: {recipe.task} has no metric {recipe.search.metric!r}; "
            f"{nearest(recipe.search.metric, known)}"
        )
    if recipe.search and recipe.search.rows and recipe.data.collect:
        raise RecipeError(
            f"search.rows: {recipe.search.rows}, but data.collect chooses its texts among all rows. Leave search.rows "
            "out, or give data.collect.count the smaller number."
        )
    if recipe.search and find_spec("optuna") is None:
        raise MachineError("search: optuna is not installed. Run: pip install 'moss-rlhf[search]'")


def check_output(recipe: Recipe, place: Path) -> None:
    """Whether the output can be written and the disk holds what a run from the start will leave."""
    parameters = initial_state(place, read_config(place), recipe.task, labels=2).parameters
    output = Path(recipe.output)
    refuse_foreign(output)
    existing = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise MachineError(f"output: {existing} is a file. Give the path of a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise MachineError(f"output: no permission to write {existing}. Give an output that you may write.")
    free = shutil.disk_usage(existing).free
    specs = [stage_spec(stage) for stage in recipe.stages]
    members = max((spec.members for spec in specs if isinstance(spec, EnsembleSpec)), default=0)
    needed = parameters * (_CHECKPOINT_BYTES + 4 * (len(specs) + 2 + members))
    if free < needed:
        raise MachineError(
            f"output: {existing} has {free / 1e9:.2f} GB free and the run needs about {needed / 1e9:.2f} GB. "
            "Free some space, or give an output on another disk."
        )
