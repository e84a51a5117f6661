"""Whether a teacher can teach: its task, labels, vocabulary, layers. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moss_rlhf.checking.source import named, source_of
from moss_rlhf.errors import ModelError, RecipeError
from moss_rlhf.model.anatomy import BlockShape, family_of
from moss_rlhf.model.config import block_shapes, read_config, trained_labels
from moss_rlhf.model.layer_map import refuse_pair
from moss_rlhf.model.locate import locate
from moss_rlhf.recipe import DistillSpec, Recipe, stages_before_compression
from moss_rlhf.tasks import TASKS


def layer_count(shapes: Sequence[BlockShape], config: dict[str, Any]) -> int:
    """ALBERT's one block is as many layers as it is gone through."""
    family = family_of(config["model_type"])
    return int(config[family.stacks[0].layers]) if family.shared else len(shapes)


def check_layer_map(spec: DistillSpec, depths: Sequence[int], parent: int, field: str) -> None:
    """Whether pairs of layers name layers; `depths` up to this stage."""
    if isinstance(spec.layers, str):
        return
    if spec.teacher == "parent":
        deep = depths[parent]
    else:
        config = read_config(locate(spec.teacher, field.replace(".layers", ".teacher")))
        deep = layer_count(block_shapes(config), config)
    for pair in spec.layers:
        refuse_pair(pair, depths[-1], deep, field)


ARTICLES = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder-decoder"}


def check_teacher(recipe: Recipe, index: int, teacher: str, config: dict[str, Any], field: str) -> None:
    if teacher != "parent":
        _check_foreign_teacher(recipe, teacher, field)
        return
    parent = stages_before_compression(recipe)
    if index < parent:
        raise RecipeError(
            f"{field}: 'parent' is the model that enters the first compressing stage, and this stage comes before it. "
            "Leave distill out here, or give the directory of a trained checkpoint."
        )
    if parent == 0 and TASKS[recipe.task].has_classes and trained_labels(config) is None:
        raise RecipeError(
            f"{field}: 'parent' would be {named(recipe)}, whose head was never trained. Put a finetune stage first, or "
            "give the directory of a trained checkpoint."
        )


def _check_foreign_teacher(recipe: Recipe, teacher: str, field: str) -> None:
    """A teacher of the task's family, which knows the model's words."""
    kind = family_of(read_config(locate(teacher, field))["model_type"]).kind
    if kind != TASKS[recipe.task].families:
        raise RecipeError(f"{field}: {teacher} is {ARTICLES[kind]}, which does not serve {recipe.task}.")
    _check_vocabulary(source_of(recipe), locate(teacher, field), field)


def _check_vocabulary(place: Path, teacher: Path, field: str) -> None:
    """Whether a teacher knows the model's words, as far as tokenizer.json tells; loaded, both are compared again."""
    own, other = (_vocabulary(folder) for folder in (place, teacher))
    if own and other and own.keys() - other.keys():
        raise ModelError(
            f"{field}: the tokenizer of {teacher} has another vocabulary ({len(other)} tokens, the model's "
            f"{len(own)}), so it would read other words than the model. Give a teacher with the same tokenizer, or one "
            "that the model's was cut from."
        )


def _vocabulary(place: Path) -> dict[str, int]:
    """{token: id} of a tokenizer.json; empty where there is none."""
    file = place / "tokenizer.json"
    if not file.exists():
        return {}
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        words = tokenizer["model"]["vocab"]
        pieces = words if isinstance(words, dict) else {piece: index for index, (piece, _) in enumerate(words)}
        return dict(pieces) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model: {file} is broken ({error}). Fetch or save the checkpoint again.") from None
