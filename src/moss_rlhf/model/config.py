"""What config.json alone says: a checkpoint is judged before its weights are touched. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import BlockShape, Family, Stack, family_of, refuse_groups

_UNBOUNDED = 4096  # tokens, where neither the network nor its tokenizer sets a limit
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


def refuse_foreign_grid(config: Mapping[str, Any], place: Path) -> None:
    """ModelError on weights that are packed for a runtime: nothing here trains or compresses them."""
    if declared := config.get("quantization_config"):
        method = declared.get("quant_method", "another library") if isinstance(declared, dict) else declared
        raise ModelError(
            f"{place}: is quantized already, by {method}, for a runtime such as vLLM. Give the checkpoint that it was "
            "made of."
        )


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
    positions = config.get("max_position_embeddings") or config.get("n_positions") or _UNBOUNDED  # T5's are relative
    return int(min(positions - offset, tokenizer_limit, _UNBOUNDED))


def hidden_size(config: Mapping[str, Any]) -> int:
    declared = config.get(KEY, {}).get("hidden")
    return int(declared or _size(config, family_of(config["model_type"]).hidden))


def head_size(config: Mapping[str, Any]) -> int:
    family = family_of(config["model_type"])
    declared = config.get(family.head_size) if family.head_size else None
    return int(declared or _size(config, family.hidden) // _size(config, family.stacks[0].heads))


def queries_per_key(config: Mapping[str, Any]) -> int:
    """Query heads that share one key-value head."""
    stack = family_of(config["model_type"]).stacks[0]
    pairs = config.get(stack.key_value_heads) if stack.key_value_heads else None
    return _size(config, stack.heads) // int(pairs) if pairs else 1


def is_gated(config: Mapping[str, Any]) -> bool:
    """Whether the feed-forward has a third matrix."""
    row = family_of(config["model_type"]).stacks[0].feed_forward[0]
    if config["model_type"] in ("t5", "mt5"):
        default = "gated-gelu" if config["model_type"] == "mt5" else "relu"
        return str(config.get("feed_forward_proj", default)).startswith("gated")
    return row.fused or len(row.ups) > 1


def _size(config: Mapping[str, Any], key: str) -> int:
    if key == "n_inner" and not config.get(key):  # GPT-2's default
        return 4 * _size(config, "n_embd")
    if key == "num_decoder_layers" and not config.get(key):  # T5's default
        return _size(config, "num_layers")
    if not isinstance(config.get(key), int):
        raise ModelError(
            f"model: config.json of a {config['model_type']} must give {key}, a whole number. Save it again."
        )
    return int(config[key])


def block_shapes(config: Mapping[str, Any]) -> tuple[BlockShape, ...]:
    """The shape of every block, the encoder's first, as declared by us or by the stock config.

    raises   ModelError on an unknown family, or declared shapes that the stock ones can't be cut down to.
    """
    family = family_of(config["model_type"])
    stock = tuple(shape for stack in family.stacks for shape in _stock_shapes(config, family, stack))
    declared = config.get(KEY, {}).get("shapes")
    if declared is None:
        return stock
    shared = queries_per_key(config)
    fitting = [_fits(found, whole, shared) for found, whole in zip(declared, stock, strict=False)]
    if len(declared) != len(stock) or not all(fitting):
        least, most = [1] * len(_sizes(stock[-1])), _sizes(stock[-1])
        raise ModelError(
            f"config.json declares the shapes {declared} of [heads, feed_forward]; it must be {len(stock)} pairs "
            f"between {least} and {most}. Save or fetch the checkpoint again."
        )
    return tuple(BlockShape(*shape) for shape in declared)


def group_names(shapes: Sequence[BlockShape]) -> list[str]:
    """The layer groups of a network with blocks of these shapes: embeddings, the blocks, head."""
    decoder = sum(shape.cross_heads > 0 for shape in shapes)
    if not decoder:
        return ["embeddings", *(f"block.{index}" for index in range(len(shapes))), "head"]
    encoder = [f"encoder.{index}" for index in range(len(shapes) - decoder)]
    return ["embeddings", *encoder, *(f"decoder.{index}" for index in range(decoder)), "head"]


def _stock_shapes(config: Mapping[str, Any], family: Family, stack: Stack) -> tuple[BlockShape, ...]:
    heads, layers = _size(config, stack.heads), _size(config, stack.layers)
    shape = BlockShape(heads, _size(config, stack.feed_forward_size), heads if stack.cross_attention else 0)
    if family.shared:
        refuse_groups(config.get("num_hidden_groups", 1), config.get("inner_group_num", 1))
    return (shape,) * (1 if family.shared else layers)


def _sizes(shape: BlockShape) -> list[int]:
    """As declared: without cross-attention where there is none."""
    return [shape.heads, shape.feed_forward, *([shape.cross_heads] if shape.cross_heads else [])]


def _fits(declared: object, stock: BlockShape, queries_per_key: int) -> bool:
    """Whether the stock block can be cut to the declared one: key-value heads go whole, the last's queries singly."""
    limits = _sizes(stock)
    return (
        isinstance(declared, list)
        and len(declared) == len(limits)
        and all(isinstance(size, int) and 1 <= size <= limit for size, limit in zip(declared, limits, strict=True))
        and (declared[0] < queries_per_key or declared[0] % queries_per_key == 0)
    )


def scales_by_hidden_size(config: Mapping[str, Any]) -> bool:
    """Whether embeddings are multiplied by the root of the hidden size that config.json gives."""
    return config["model_type"] == "gemma" or bool(config.get("scale_embedding", False))


WINDOWED = (
    "its converter leaves out the sliding windows of a {kind} (use_sliding_window), so longer texts would be answered "
    "differently. Set use_sliding_window to false in config.json if no text is longer than a window."
)


def has_windows(config: Mapping[str, Any]) -> bool:
    """Whether some layers of a Qwen see the nearest tokens alone."""
    return bool(config.get("use_sliding_window", False))
