"""Export a model in memory: encoders to ONNX, decoders and encoder-decoders to CTranslate2, int4 for vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moss_rlhf.errors import ModelError
from moss_rlhf.exporting.compressed_tensors import export_compressed_tensors
from moss_rlhf.exporting.ctranslate2 import export_ctranslate2
from moss_rlhf.exporting.onnx import export_onnx
from moss_rlhf.files import refuse_foreign_files
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.batching import batches_of

FORMATS = ("auto", "onnx", "ctranslate2", "compressed-tensors")
SENTENCES = ("What a film!", "The room was cold, and nobody came when we called the desk twice.", "这家店的面很好吃")


@takes_model
def export(
    model: Model, place: str | Path, texts: Sequence[str] = SENTENCES, *, format: str = "auto"
) -> dict[str, object]:
    """Write a model to the directory `place`; returns the facts.

    texts    what the files are held against PyTorch with.
    format   onnx, ctranslate2, compressed-tensors; or auto: of the kind's fastest runtime here, ONNX for encoders and
             CTranslate2 for the others, and int4, which neither holds, as compressed-tensors for vLLM.
    raises   ModelError where the format can't hold the model; MachineError where its library is not installed;
             MossError where the files answer differently.
    """
    place, chosen = Path(place).resolve(), _chosen(model, format)
    refuse_foreign_files(place)
    if chosen == "ctranslate2":
        return export_ctranslate2(model, place, [(text, text) for text in texts])
    tokens = [model.tokenizer(text, truncation=True, max_length=model.max_length) for text in texts]
    padding = {name: value for name, value in TASKS[model.task].padding(model.tokenizer).items() if name != "labels"}
    batches = batches_of(tokens, len(tokens), padding)
    write = export_onnx if chosen == "onnx" else export_compressed_tensors
    return write(model, place, batches)


def _chosen(model: Model, format: str) -> str:
    kind = model.anatomy.family.kind
    if format not in FORMATS:
        raise ModelError(f"export: format must be {', '.join(FORMATS)}, got {format!r}.")
    if format == "onnx" and kind != "encoder":
        raise ModelError(f"export: ONNX files are for encoders, and this is a {kind}. Give format ctranslate2.")
    if format != "auto":
        return format
    if model.quantization and model.quantization.scheme == "int4":
        return "compressed-tensors"
    return "onnx" if kind == "encoder" else "ctranslate2"
