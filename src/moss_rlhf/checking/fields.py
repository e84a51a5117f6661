"""Which fine-tuning a stage holds, and what its field is called. No torch."""

from __future__ import annotations

from typing import Any

from moss_rlhf.recipe import EnsembleSpec, FinetuneSpec, stage_kind, stage_spec


def training_of(spec: object) -> FinetuneSpec | None:
    """How a stage trains, if it does: an ensemble's members train alike."""
    if isinstance(spec, EnsembleSpec):
        return spec.finetune
    return spec if isinstance(spec, FinetuneSpec) else None


def field_of(index: int, stage: Any) -> str:
    """Where a stage says how it trains."""
    inside = ".finetune" if isinstance(stage_spec(stage), EnsembleSpec) else ""
    return f"stages.{index}.{stage_kind(stage)}{inside}"
