"""Options of `finetune` that can't go together: one table for a recipe that is read and for a call from Python."""

from __future__ import annotations

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
