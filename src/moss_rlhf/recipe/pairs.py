"""Options of `finetune` that can't go together, or not with a task: the same for a recipe and for Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def pair_fault(
    *,
    movement: Any,
    quantization_aware: Any,
    l1: float,
    l2_start: float,
    reinitialise: int,
    phases: Any,
    adapter: Any,
    compile: bool,
    mixup: float,
    loss: Any,
    teacher: bool,
    average: Any,
    packing: bool,
    micro_batch_size: int | None,
    inside: bool,
) -> str | None:
    """One sentence where two options contradict each other, else None. Of each, what was given, or whether it was.

    inside   whether what the teacher does inside is learned: hidden states or attention.
    """
    faults = {
        "movement and l1 both choose what becomes zero. Leave one of them out.": movement and l1,
        "the weights below adapters stand still, so movement, quantization_aware, l1, l2_start, reinitialise and "
        "phases have nothing to work on. Leave them out, or adapter.": adapter
        and (movement or quantization_aware or l1 or l2_start or reinitialise or phases),
        "movement, quantization_aware and adapter change what the network runs. Leave one out, or compile.": compile
        and (movement or quantization_aware or adapter),
        "the mean of different movement masks has fewer zeros, and the mean of rounded weights is on no grid. Leave "
        "average out, or movement and quantization_aware.": average and (movement or quantization_aware),
        "a packed batch is one row, so micro_batch_size can't cut it, and distill.hidden and distill.attention can't "
        "tell its documents apart. Leave them out, or packing.": packing and (micro_batch_size or inside),
        "mixed rows have no teacher's answer of their own. Leave mixup out, or distill.": mixup and teacher,
        "mixed rows have no loss of their own. Leave mixup out, or loss.": mixup and loss is not None,
        "mixed rows have no compiled block of their own. Leave mixup out, or compile.": mixup and compile,
    }
    return next((fault for fault, holds in faults.items() if holds), None)


def trains_all_from(unfreeze: str, phases: Sequence[Any]) -> float:
    """The share of the steps from which every layer trains; 1 where some never do."""
    if not phases:
        return {"gradual": 0.5, "head_first": 1 / 3}.get(unfreeze, 0.0)
    partial = [position for position, phase in enumerate(phases, 1) if phase.train != "all"]
    before = sum(int(phase.epochs) for phase in phases[: partial[-1]]) if partial else 0
    return before / sum(int(phase.epochs) for phase in phases)


def loss_fault(task: str, loss: Any) -> str | None:
    """What of a loss a language model can't be trained with, as the field and one sentence, else None."""
    given = {
        "kind": loss.kind != "cross_entropy",
        "class_weights": loss.class_weights is not None,
        "gamma": loss.gamma > 0,
    }
    name = next((name for name, holds in given.items() if holds), None)
    return name and (
        f"loss.{name}: {task} foretells tokens, by cross-entropy. Leave it out; label_smoothing and r_drop can be used."
    )


def mixup_fault(task: str, *, classes: bool, kind: str, shared: bool) -> str | None:
    """Why rows can't be mixed, as the field and one sentence, else None.

    kind     of the model, `model_type`; shared   whether one block is all layers.
    """
    if not classes:
        return f"mixup: {task} has no classes to mix. Leave it out."
    if shared:
        return f"mixup: {kind}'s one block serves all layers, so states would be mixed once a layer. Leave it out."
    return None


def packing_fault(task: str) -> str | None:
    """Why rows can't be packed, as the field and one sentence, else None."""
    if task == "text-generation":
        return None
    return f"packing: {task} has no documents to pack; it is for text-generation. Leave it out."
