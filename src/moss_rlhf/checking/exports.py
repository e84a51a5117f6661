"""Whether a runtime will hold what the stages leave. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from moss_rlhf.checking.network import State
from moss_rlhf.checking.teachers import ARTICLES
from moss_rlhf.errors import MachineError, RecipeError
from moss_rlhf.model.anatomy import family_of
from moss_rlhf.model.config import WINDOWED, has_windows, head_size, scales_by_hidden_size
from moss_rlhf.recipe import QuantizeSpec, Recipe, stage_spec
from moss_rlhf.tasks import TASKS


def check_compressed_tensors(recipe: Recipe, state: State, config: dict[str, Any]) -> None:
    """Whether vLLM's format will hold what the stages leave."""
    specs, kind = [stage_spec(stage) for stage in recipe.stages], config["model_type"]
    family, quantize = family_of(kind), next((spec for spec in specs if isinstance(spec, QuantizeSpec)), None)
    heads, hidden = {shape.heads for shape in state.shapes}, state.dimensions.hidden
    uneven = len(set(state.shapes)) > 1 or not state.even
    cut_hidden = hidden != config[family.hidden]
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
    if "ctranslate2" in recipe.export and find_spec("ctranslate2") is None:
        raise MachineError("export: CTranslate2 is not installed: pip install 'moss-rlhf[ctranslate2]'.")


def check_ctranslate2(state: State, config: dict[str, Any]) -> None:
    """Whether CTranslate2 will hold what the stages leave."""
    kind = config["model_type"]
    narrowed = state.dimensions.hidden != config[family_of(kind).hidden]
    heads = {count for shape in state.shapes for count in (shape.heads, shape.cross_heads) if count}
    faults = {
        f"it scales a {kind}'s embeddings by the root of the hidden size that it finds. Leave hidden out of narrow, or "
        "leave export out.": narrowed and scales_by_hidden_size(config),
        "it holds one number of heads for all layers, and narrow with a budget leaves the layers different ones. Give "
        "shares of heads and feed_forward, or leave export out.": len(heads) > 1 or not state.even,
        WINDOWED.format(kind=kind): has_windows(config),
    }
    for fault, holds in faults.items():
        if holds:
            raise RecipeError(f"export: ctranslate2: {fault}")


def check_scheme(scheme: str, export: Sequence[str], kind: str, field: str) -> None:
    if scheme == "int8_static" and kind != "encoder":
        raise RecipeError(f"{field}.scheme: int8_static is for encoders. Give int8.")
    for title, held in (_HELD[name] for name in export if name in _HELD):  # vLLM's format: below
        other = ", or compressed-tensors" if scheme == "int4" else ""
        if scheme not in held:
            raise RecipeError(f"{field}.scheme: {scheme} can't be exported to {title}. Give int8{other}.")
