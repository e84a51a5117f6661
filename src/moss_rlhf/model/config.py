"""What config.json alone says: a checkpoint is judged before its weights are touched. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import BlockShape, family_of

KEY = "moss_rlhf"  # of config.json: everything that is ours


def read_config(place: Path) -> dict[str, Any]:
    """config.json as it stands."""
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model: {place}/config.json is broken ({error}). Fetch or save the checkpoint again."
        ) from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model: {place}/config.json names no model_type. Give a Hugging Face checkpoint.")
    return config


def trained_labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The label names of a checkpoint whose classification head was trained, else None."""
    architectures = config.get("architectures") or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        return None
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    return tuple(str(names[key]) for key in sorted(names, key=int))


def position_limit(config: Mapping[str, Any], tokenizer_limit: float) -> int:
    """Tokens of the longest text: what the network has positions for, or its tokenizer's own limit."""
    # RoBERTa counts positions from the padding index + 1
    offset = config["pad_token_id"] + 1 if config["model_type"] in ("roberta", "xlm-roberta") else 0
    return int(min(config["max_position_embeddings"] - offset, tokenizer_limit))


def hidden_size(config: Mapping[str, Any]) -> int:
    return int(config[family_of(config["model_type"]).hidden])


def head_size(config: Mapping[str, Any]) -> int:
    return hidden_size(config) // int(config[family_of(config["model_type"]).heads])


def block_shapes(config: Mapping[str, Any]) -> tuple[BlockShape, ...]:
    """The shape of every block, as declared by us or by the stock config.

    raises   ModelError on an unknown family, or declared shapes that the stock ones can't be cut down to.
    """
    family = family_of(config["model_type"])
    stock = BlockShape(int(config[family.heads]), int(config[family.feed_forward]))
    layers, declared = int(config[family.layers]), config.get(KEY, {}).get("shapes")
    if declared is None:
        return (stock,) * layers
    if len(declared) != layers or not all(_fits(shape, stock) for shape in declared):
        raise ModelError(
            f"config.json declares the shapes {declared} of [heads, feed_forward]; it must be {layers} pairs between "
            f"[1, 1] and [{stock.heads}, {stock.feed_forward}]. Save or fetch the checkpoint again."
        )
    return tuple(BlockShape(*shape) for shape in declared)


def _fits(shape: object, stock: BlockShape) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and 1 <= shape[0] <= stock.heads
        and 1 <= shape[1] <= stock.feed_forward
    )
