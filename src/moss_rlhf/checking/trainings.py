"""Whether a fine-tuning or a pretraining finds what it names. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moss_rlhf.checking.fields import field_of, training_of
from moss_rlhf.checking.teachers import check_layer_map, check_teacher
from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import MachineError, RecipeError, nearest
from moss_rlhf.model.anatomy import BlockShape, family_of, matrix_names
from moss_rlhf.model.config import KEY, group_names, head_size, hidden_size, queries_per_key, read_config
from moss_rlhf.recipe import (
    AdapterSpec,
    DistillSpec,
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    Recipe,
    SensitivitySpec,
    ShortenSpec,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.recipe.pairs import loss_fault, mixup_fault, packing_fault
from moss_rlhf.recipe.pretraining import OBJECTIVES
from moss_rlhf.tasks import TASKS


def check_finetuning(
    recipe: Recipe, index: int, shapes: tuple[BlockShape, ...], depths: Sequence[int], place: Path
) -> None:
    """Whether a fine-tuning finds its metric, groups, damage, adapters and teacher; `depths` up to this stage."""
    stage, config = recipe.stages[index], read_config(place)
    spec, field = training_of(stage_spec(stage)), field_of(index, stage)
    if spec is None:
        return
    _check_metric(spec.metric, recipe.task, f"{field}.metric")
    _check_task(spec, recipe.task, config, field)
    for name in spec.report_to:
        if find_spec(name) is None:
            raise MachineError(f"{field}.report_to: {name} is not installed. Run: pip install {name}")
    _check_layers(spec, shapes, config, field)
    if spec.layers == "by_damage":
        _check_damage(recipe, index, place, field)
    if spec.adapter:
        _check_adapter(recipe, index, spec.adapter, config, f"{field}.adapter")
    if isinstance(spec.distill, DistillSpec):
        check_teacher(recipe, index, spec.distill.teacher, config, f"{field}.distill.teacher")
        _check_relations(spec.distill, shapes, config, f"{field}.distill.relation_heads")
        check_layer_map(spec.distill, depths, stages_before_compression(recipe), f"{field}.distill.layers")


def _check_relations(distill: DistillSpec, shapes: Sequence[BlockShape], config: dict[str, Any], field: str) -> None:
    """Whether the student's attentions can be split into the relation heads asked for."""
    asked, size, shared = distill.relation_heads, head_size(config), queries_per_key(config)
    if asked == "auto" or not distill.attention:
        return
    widths = {count * size for shape in shapes for count in (shape.heads, max(1, shape.heads // shared))}
    if any(width % asked for width in widths):
        raise RecipeError(
            f"{field}: {asked} does not divide {', '.join(map(str, sorted(widths)))}, the features of the student's "
            f"projections. Give a divisor of {math.gcd(*widths)}, or auto."
        )


def _check_task(spec: FinetuneSpec, name: str, config: dict[str, Any], field: str) -> None:
    """What only labels, or only documents, can be trained with."""
    classes, family = TASKS[name].has_classes, family_of(config["model_type"])
    faults = (
        packing_fault(name) if spec.packing else None,
        mixup_fault(name, classes=classes, kind=config["model_type"], shared=family.shared) if spec.mixup else None,
        loss_fault(name, spec.loss) if spec.loss and not classes else None,
    )
    if fault := next(filter(None, faults), None):
        raise RecipeError(f"{field}.{fault}")


def _check_layers(spec: FinetuneSpec, shapes: Sequence[BlockShape], config: dict[str, Any], field: str) -> None:
    """Phases name groups that are there, and there are blocks to draw anew."""
    groups = group_names(shapes)
    for position, phase in enumerate(spec.phases or ()):
        for name in () if phase.train == "all" else phase.train:
            if name not in groups:
                raise RecipeError(
                    f"{field}.phases.{position}.train: there is no group {name!r}. The groups are {', '.join(groups)}."
                )
    if spec.reinitialise and family_of(config["model_type"]).shared:
        raise RecipeError(f"{field}.reinitialise: the layers of a {config['model_type']} share one block.")
    if spec.reinitialise > len(shapes):
        raise RecipeError(
            f"{field}.reinitialise: {spec.reinitialise} of {len(shapes)} blocks. Give at most {len(shapes)}."
        )


def _check_damage(recipe: Recipe, index: int, place: Path, field: str) -> None:
    """Somebody measured the sensitivity of the blocks that this stage finds."""
    before = [stage_spec(stage) for stage in recipe.stages[:index]]
    measured = [position for position, spec in enumerate(before) if isinstance(spec, SensitivitySpec)]
    if not measured and not (place / "sensitivity.json").exists():
        raise RecipeError(
            f"{field}.layers: by_damage reads what sensitivity measured, and no stage before this one measures it. Put "
            "`- sensitivity` before it, or leave layers out."
        )
    if any(isinstance(spec, ShortenSpec) for spec in before[measured[-1] if measured else 0 :]):
        raise RecipeError(
            f"{field}.layers: by_damage, but sensitivity was measured before a shorten stage removed blocks. Put "
            "`- sensitivity` after it."
        )


def _check_adapter(recipe: Recipe, index: int, adapter: AdapterSpec, config: dict[str, Any], field: str) -> None:
    """Whether peft is there, and merging would undo no pruning that is to stay."""
    if find_spec("peft") is None:
        raise MachineError(f"{field}: peft is not installed. Install it with: pip install 'moss-rlhf[adapters]'.")
    known = matrix_names(family_of(config["model_type"]))
    for name in () if isinstance(adapter.targets, str) else adapter.targets:
        if name.rpartition(".")[2] not in known:
            raise RecipeError(f"{field}.targets: no matrix of a block is called {name!r}; {nearest(name, known)}")
    pruned = config.get(KEY, {}).get("pruned") or any(
        isinstance(stage_spec(stage), PruneSpec) for stage in recipe.stages[:index]
    )
    if pruned and not adapter.keep_zeros:
        raise RecipeError(
            f"{field}: the model is pruned, and merging adapters into it would undo that. Set keep_zeros: true, which "
            "sets the zeros again after merging, or leave adapter out."
        )


def check_pretraining(recipe: Recipe, index: int, config: dict[str, Any], field: str) -> None:
    """Whether there are texts to read, and the model still has the hidden size that a language model's head fits."""
    spec = stage_spec(recipe.stages[index])
    kind = family_of(config["model_type"]).kind
    fitting = OBJECTIVES[kind]
    if spec.objective not in ("auto", *fitting):
        raise RecipeError(
            f"{field}.objective: {spec.objective} can't be learned by a {config['model_type']}, an {kind}. Give "
            f"{' or '.join(fitting)}, or leave it out."
        )
    if spec.texts != "task":
        read_texts(spec.texts, f"{field}.texts", limit=1)
    narrowed = any(
        isinstance(before, NarrowSpec) and before.hidden for before in map(stage_spec, recipe.stages[:index])
    )
    if narrowed or hidden_size(config) != config[family_of(config["model_type"]).hidden]:
        raise RecipeError(
            f"{field}: the hidden size is narrowed before it, and a language model's head fits the whole one. Put "
            "pretrain before the stage that narrows it."
        )


def _check_metric(name: str | None, task: str, field: str) -> None:
    known = ["loss", *TASKS[task].metrics]
    if name is not None and name not in known:
        raise RecipeError(f"{field}: {task} has no metric {name!r}; {nearest(name, known)}")
