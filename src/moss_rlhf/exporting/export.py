"""Export a model in memory: encoders to ONNX, decoders and encoder-decoders to CTranslate2."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moss_rlhf.exporting.ctranslate2 import export_ctranslate2
from moss_rlhf.exporting.onnx import export_onnx
from moss_rlhf.files import refuse_foreign_files
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.tasks.batching import batches_of, padding_of

SENTENCES = ("What a film!", "The room was cold, and nobody came when we called the desk twice.", "这家店的面很好吃")


def export(model: Model, place: str | Path, texts: Sequence[str] = SENTENCES) -> dict[str, object]:
    """Write a model to the directory `place`, in the format of its kind's fastest runtime here; returns the facts.

    texts    what the files are held against PyTorch with.
    raises   ModelError where the format can't hold the model; MossError where the files answer differently.
    """
    place = Path(place).resolve()
    refuse_foreign_files(place)
    if model.anatomy.family.kind != "encoder":
        return export_ctranslate2(model, place, [(text, text) for text in texts])
    tokens = [model.tokenizer(text, truncation=True, max_length=model.max_length) for text in texts]
    return export_onnx(model, place, batches_of(tokens, len(tokens), padding_of(model.tokenizer)))
