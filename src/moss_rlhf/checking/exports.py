"""Whether a runtime will hold what the stages leave. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from moss_rlhf.checking.source import source_of
from moss_rlhf.checking.teachers import ARTICLES
from moss_rlhf.errors import MachineError, RecipeError
from moss_rlhf.model.anatomy import BlockShape, family_of
from moss_rlhf.model.config import KEY, head_size, hidden_size, read_config, scales_by_hidden_size
from moss_rlhf.recipe import NarrowSpec, QuantizeSpec, Recipe, stage_spec
from moss_rlhf.tasks import TASKS


def check_compressed_tensors(recipe: Recipe, shapes: tuple[BlockShape, ...], config: dict[str, Any]) -> None:
    """Whether vLLM's format will hold what the stages leave."""
    specs, kind = [stage_spec(stage) for stage in recipe.stages], config["model_type"]
    family, quantize = family_of(kind), next((spec for spec in specs if isinstance(spec, QuantizeSpec)), None)
    narrowed = [spec for spec in specs if isinstance(spec, NarrowSpec)]
    heads, hidden = {shape.heads for shape in shapes}, hidden_size(config)
    uneven = len(set(shapes)) > 1 or any(spec.macs or spec.parameters or spec.latency for spec in narrowed)
    cut_hidden = any(spec.hidden for spec in narrowed) or (KEY in config and "hidden" in config[KEY])
    odd_heads = not family.head_size and any(count * head_size(config) != hidden for count in heads)
    odd_heads |= family.heads_divide_hidden and any(hidden % count for count in heads)
    faults = {
        "it holds quantized models. Put quantize with scheme int4 or int8 last.": (
            quantize is None or quantize.scheme == "int8_static"
        ),
        f"vLLM, which reads it, serves no encoder-decoder such as a {kind}.": family.kind == "encoder-decoder",
        f"a {kind} keeps its matrices transposed, in Conv1D layers, which it can't hold.": family.transposed,
        f"the stock config of a {kind} can't say what the stages leave: {_UNIFORM}": (
            uneven or odd_heads or (cut_hidden and (not family.head_size or family.scales_embeddings))
        ),
        "the package is missing: pip install 'moss-rlhf[vllm]'.": find_spec("compressed_tensors") is None,
    }
    for fault, holds in faults.items():
        if holds:
            raise RecipeError(f"export: compressed-tensors: {fault}")


_UNIFORM = "shapes that differ from block to block, fewer heads or a smaller hidden size. Export to another format."


_RUNTIMES = {"encoder": "onnx", "decoder": "ctranslate2", "encoder-decoder": "ctranslate2"}


_HELD = {"onnx": ("ONNX", ("int8", "int8_static")), "ctranslate2": ("CTranslate2", ("int8",))}


def check_export(recipe: Recipe) -> None:
    """Encoders go to ONNX, the others to CTranslate2, which holds one number of heads; vLLM's format: below."""
    kind = TASKS[recipe.task].families
    fitting = _RUNTIMES[kind]
    if unfit := [name for name in recipe.export if name not in (fitting, "compressed-tensors")]:
        raise RecipeError(f"export: {unfit[0]} does not serve {ARTICLES[kind]}. Give [{fitting}], or leave export out.")
    if "ctranslate2" not in recipe.export:
        return
    if find_spec("ctranslate2") is None:
        raise MachineError("export: CTranslate2 is not installed: pip install 'moss-rlhf[ctranslate2]'.")
    config = read_config(source_of(recipe))
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if isinstance(spec, NarrowSpec) and spec.hidden and scales_by_hidden_size(config):
            raise RecipeError(
                f"stages.{index}.narrow.hidden: CTranslate2 scales a {config['model_type']}'s embeddings by the root "
                "of the hidden size that it finds. Leave hidden out, or leave export out."
            )
        if isinstance(spec, NarrowSpec) and max(spec.macs, spec.parameters, spec.latency):
            raise RecipeError(
                f"stages.{index}.narrow: a budget leaves the layers different numbers of heads, and CTranslate2 holds "
                "one. Give shares of heads and feed_forward, or leave export out."
            )


def check_scheme(scheme: str, export: Sequence[str], kind: str, field: str) -> None:
    if scheme == "int8_static" and kind != "encoder":
        raise RecipeError(f"{field}.scheme: int8_static is for encoders. Give int8.")
    for title, held in (_HELD[name] for name in export if name in _HELD):  # vLLM's format: below
        other = ", or compressed-tensors" if scheme == "int4" else ""
        if scheme not in held:
            raise RecipeError(f"{field}.scheme: {scheme} can't be exported to {title}. Give int8{other}.")
