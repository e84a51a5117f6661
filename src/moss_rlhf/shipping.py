"""The final model → what is shipped: a runtime's file, or the checkpoint itself."""

from __future__ import annotations

from moss_rlhf.exporting import FILES, export_ctranslate2, export_onnx
from moss_rlhf.measuring import ARTIFACTS, Artifact, torch_artifact
from moss_rlhf.preparing import Session


def ship(session: Session) -> tuple[Artifact, Artifact | None]:
    """The artifact that is shipped, and for an int8 file the same shape and runtime in float32, to compare with.

    The latter stands in the run's folder `work`, which the caller removes.
    """
    model, place = session.model_after(len(session.folders)), session.place.path
    if not session.recipe.export:
        return torch_artifact(place / "model", model), None
    kind = session.recipe.export[0]  # a model has one runtime that fits it: `moss check` refuses the others
    plain = place / "work" / "float32" / FILES[kind].name if model.quantization else None
    if kind == "onnx":
        facts = export_onnx(model, place / kind, session.sample_batches(model.tokenizer), plain)
    else:
        facts = export_ctranslate2(model, place / kind, session.sample_texts(), plain.parent if plain else None)
    session.progress.event("exported", **facts)
    shipped = ARTIFACTS[kind](place / FILES[kind], model, str(model.quantization or "float32"))
    return shipped, ARTIFACTS[kind](plain, model, "float32") if plain else None
