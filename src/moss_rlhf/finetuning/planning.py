"""From what the user says of layers and phases to a timetable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moss_rlhf.errors import ModelError, RecipeError, nearest
from moss_rlhf.finetuning.layers import LayerGroup, damage_multipliers, damage_order, layer_learning_rates
from moss_rlhf.finetuning.options import Phase, option
from moss_rlhf.finetuning.timetable import Phases, Stretch, Thaw, Timetable, head_first
from moss_rlhf.model.damage import block_damage
from moss_rlhf.strategy import SCHEDULES, Schedule, Unfreeze, shaped

Layers = Literal["by_depth", "by_damage"]
EPOCHS = 3  # where neither `epochs` nor `phases` says otherwise


@dataclass(frozen=True)
class Course:
    """How long a training is, and what trains when."""

    epochs: int
    steps: int
    timetable: Timetable


def course_of(
    groups: Sequence[LayerGroup],
    sensitivity: Mapping[str, Any] | None,
    *,
    epochs: int | None,
    steps_per_epoch: int,
    phases: Sequence[Phase | Mapping[str, Any]] | None,
    unfreeze: Unfreeze,
    learning_rate: float,
    schedule: Schedule,
    warmup: float,
    layer_decay: float,
    layers: Layers,
) -> Course:
    """The course of a training, from what `finetune` is told of epochs, phases, rates and layers.

    sensitivity   the model's, which `layers: by_damage` reads.
    raises        RecipeError or ModelError where they can't be; see `phases_of`, `epochs_of`, `damage_of`.
    """
    names = [group.name for group in groups]
    planned = phases_of(phases, {group.name: len(group.parameters) for group in groups}, unfreeze)
    count = epochs_of(epochs, planned)
    timetable = timetable_of(
        names,
        planned,
        unfreeze=unfreeze,
        steps=count * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        layer_decay=layer_decay,
        damage=damage_of(sensitivity, names) if layers == "by_damage" else None,
    )
    return Course(count, count * steps_per_epoch, timetable)


def phases_of(
    given: Sequence[Phase | Mapping[str, Any]] | None, groups: Mapping[str, int], unfreeze: Unfreeze
) -> list[Phase]:
    """The phases, every one of them possible; none given: [].

    groups   {name: how many parameters}.
    raises   RecipeError on a group that the network does not have, on a phase that would train nothing, or `unfreeze`
             beside phases.
    """
    phases = [option(Phase, phase, f"phases.{index}") or Phase() for index, phase in enumerate(given or ())]
    if given is not None and not phases:
        raise RecipeError("finetune.phases: is empty; give at least one, or leave it out.")
    if phases and unfreeze != "all":
        raise RecipeError(f"finetune.unfreeze: {unfreeze} and phases both say what trains when; give one of them.")
    if unfreeze != "all" and not groups["head"]:
        raise RecipeError(
            f"finetune.unfreeze: {unfreeze} trains the head alone first, and this network's is tied to the embeddings. "
            "Give phases whose first one trains a block too."
        )
    for index, phase in enumerate(phases):
        _check(phase, f"finetune.phases.{index}", groups)
    return phases


def _check(phase: Phase, place: str, groups: Mapping[str, int]) -> None:
    names = [] if phase.train == "all" else phase.train
    if isinstance(names, str) or (phase.train != "all" and not names):
        raise RecipeError(f"{place}.train: {phase.train!r} can't be used; give all, or a list such as [head, block.5].")
    for name in names:
        if name not in groups:
            raise RecipeError(f"{place}.train: there is no group {name!r}. The groups are {', '.join(groups)}.")
    if phase.schedule == "reduce_on_plateau":
        raise RecipeError(
            f"{place}.schedule: reduce_on_plateau follows the evaluations of all phases. Give it to the stage, or "
            "another one to the phase."
        )
    if names and not any(groups[name] for name in names):
        raise RecipeError(f"{place}.train: {', '.join(names)} of this network is tied to the embeddings. Add a block.")
    if phase.epochs < 1:
        raise RecipeError(f"{place}.epochs: {phase.epochs} trains nothing; give at least 1.")
    if phase.schedule is not None and phase.schedule not in SCHEDULES:
        raise RecipeError(f"{place}.schedule: unknown {phase.schedule!r}; {nearest(phase.schedule, SCHEDULES)}")
    if phase.learning_rate is not None and phase.learning_rate <= 0:
        raise RecipeError(f"{place}.learning_rate: {phase.learning_rate} moves nothing; give one above 0.")


def epochs_of(given: int | None, phases: Sequence[Phase]) -> int:
    """How many epochs a training has: as given, or the sum of the phases'.

    raises   RecipeError where both are given and differ.
    """
    total = sum(phase.epochs for phase in phases)
    if phases and given not in (None, total):
        raise RecipeError(f"finetune.epochs: {given}, but the phases have {total} together. Leave epochs out.")
    return total if phases else EPOCHS if given is None else given


def damage_of(table: Mapping[str, Any] | None, groups: Sequence[str]) -> list[float]:
    """The damage of each block, the lowest first.

    table    `model.sensitivity`.
    raises   ModelError where there is none, or it was measured on other blocks.
    """
    if table is None:
        raise ModelError(
            "finetune.layers: by_damage reads what sensitivity measured, and the model holds none. Put a sensitivity "
            "stage before this one, or leave layers out."
        )
    damage, blocks = block_damage(table), groups[1:-1]
    if set(damage) != set(blocks):
        raise ModelError(
            f"finetune.layers: by_damage; sensitivity was measured on {', '.join(damage)}, the network has "
            f"{', '.join(blocks)}. Measure it anew, after the stage that removed blocks."
        )
    return [damage[name] for name in blocks]


def timetable_of(
    groups: Sequence[str],
    phases: Sequence[Phase],
    *,
    unfreeze: Unfreeze,
    steps: int,
    steps_per_epoch: int,
    learning_rate: float,
    schedule: Schedule,
    warmup: float,
    layer_decay: float,
    damage: Sequence[float] | None,
) -> Timetable:
    """Which groups train at a step, and how fast.

    damage   of each block, where rates and order follow it; None: they follow the depth.
    raises   RecipeError where both `layer_decay` and `damage` would set the rates.
    """
    if damage is not None and {layer_decay, *(phase.layer_decay for phase in phases)} - {1.0, None}:
        raise RecipeError("finetune.layers: by_damage and layer_decay both set the rates of layers; give one of them.")
    multipliers = damage_multipliers(damage) if damage is not None else [1.0] * len(groups)

    def rates(rate: float, decay: float) -> tuple[float, ...]:
        by_depth = layer_learning_rates(len(groups) - 2, rate, decay)
        return tuple(each * multiplier for each, multiplier in zip(by_depth, multipliers, strict=True))

    def stretch(phase: Phase) -> Stretch:
        decay = layer_decay if phase.layer_decay is None else phase.layer_decay
        highest = rates(learning_rate if phase.learning_rate is None else phase.learning_rate, decay)
        moving = groups if phase.train == "all" else phase.train
        return Stretch(
            tuple(rate if name in moving else 0.0 for name, rate in zip(groups, highest, strict=True)),
            shaped(phase.schedule) if phase.schedule else schedule,
            warmup if phase.warmup is None else phase.warmup,
            phase.epochs * steps_per_epoch,
        )

    if phases:
        return Phases(tuple(stretch(phase) for phase in phases))
    usual = rates(learning_rate, layer_decay)
    if unfreeze == "head_first":
        return head_first(usual, schedule, warmup, steps)
    order = damage_order(damage) if damage is not None else ()
    return Thaw(usual, unfreeze, schedule, warmup, steps, order)
