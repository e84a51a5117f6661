"""Options of a training that can't go together, told before anything is done."""

from __future__ import annotations

from typing import Any

from moss_rlhf.errors import RecipeError


def refuse_pairs(
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
    average: bool,
    packing: bool,
    micro_batch_size: int | None,
    inside: bool,
) -> None:
    """Of each option what `finetune` was given, or whether it was.

    inside   whether what the teacher does inside is learned: hidden states or attention.
    raises   RecipeError where two of them contradict each other.
    """
    if movement and l1:
        raise RecipeError("finetune: movement and l1 both choose what becomes zero. Leave one of them out.")
    if adapter and (movement or quantization_aware or l1 or l2_start or reinitialise or phases):
        raise RecipeError(
            "finetune.adapter: the weights below adapters stand still, so movement, quantization_aware, l1, l2_start, "
            "reinitialise and phases have nothing to work on. Leave them out, or adapter."
        )
    if compile and (movement or quantization_aware or adapter):
        raise RecipeError(
            "finetune.compile: movement, quantization_aware and adapter change what the network runs. Leave one out."
        )
    if average and (movement or quantization_aware):
        raise RecipeError(
            "finetune.average: the mean of different movement masks has fewer zeros, and the mean of rounded weights "
            "is on no grid. Leave average out, or movement and quantization_aware."
        )
    if packing and (micro_batch_size or inside):
        raise RecipeError(
            "finetune.packing: a packed batch is one row, so micro_batch_size can't cut it, and distill.hidden and "
            "distill.attention can't tell its documents apart. Leave them out, or packing."
        )
    of_mixed_rows = {"teacher's answer": teacher, "loss": loss is not None, "compiled block": compile}
    for name in (name for name, present in of_mixed_rows.items() if mixup and present):
        raise RecipeError(f"finetune.mixup: mixed rows have no {name} of their own. Leave one of them out.")
