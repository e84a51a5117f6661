"""The final model → what is shipped: a runtime's file, or the checkpoint itself; and files for a runtime elsewhere."""

from __future__ import annotations

from typing import Any

from moss_rlhf.artifacts import ARTIFACTS, Artifact, torch_artifact
from moss_rlhf.exporting import FILES, export_compressed_tensors, export_ctranslate2, export_onnx
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.preparing import Session

_VLLM = "compressed-tensors"


def ship(session: Session) -> tuple[Artifact, Artifact | None]:
    """The artifact that is shipped, and for an int8 file the same shape and runtime in float32, to compare with.

    The latter stands in the run's folder `work`, which the caller removes.
    """
    model, place = session.model_after(len(session.folders)), session.place.path
    kind = next((name for name in session.recipe.export if name in FILES), None)  # the only one that fits
    if kind is None:
        return torch_artifact(place / "model", model), None
    plain = place / "work" / "float32" / FILES[kind].name if model.quantization else None
    if kind == "onnx":
        facts = export_onnx(model, place / kind, session.sample_batches(model.tokenizer), plain)
    else:
        facts = export_ctranslate2(model, place / kind, session.sample_texts(), plain.parent if plain else None)
    session.progress.event("exported", **facts)
    shipped = ARTIFACTS[kind](place / FILES[kind], model, str(model.quantization or "float32"))
    return shipped, ARTIFACTS[kind](plain, model, "float32") if plain else None


def ship_for_vllm(session: Session, model: Model) -> dict[str, Any]:
    """The facts of what is shipped for a runtime that does not run here, by its format."""
    if _VLLM not in session.recipe.export:
        return {}
    place = session.place.path / _VLLM
    facts = export_compressed_tensors(model, place, session.sample_batches(model.tokenizer))
    session.progress.event("exported", **facts)
    return {_VLLM: facts}
