"""The network as a stage finds it, told from config.json and the headers of the weight files. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.model import memory
from moss_rlhf.model.anatomy import BlockShape, family_of
from moss_rlhf.model.config import block_shapes, head_size, hidden_size, is_gated, queries_per_key
from moss_rlhf.model.cost import Dimensions, all_block_parameters
from moss_rlhf.model.locate import read_header, weight_files
from moss_rlhf.tasks import TASKS

_EVERY_TOKEN = (
    *("embeddings_project.weight", "embedding_hidden_mapping_in.weight", "encoder.conv.conv.weight"),
    *("project_in.weight", "project_out.weight"),
)


@dataclass(frozen=True)
class State:
    """The network as a stage finds it."""

    dimensions: Dimensions
    parameters: int
    speaks: bool  # a language model, whose head gives logits for tokens
    even: bool = True  # the blocks' shapes are these; after a budget they are foretold as if it was spent evenly

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return self.dimensions.blocks

    @property
    def network(self) -> memory.Network:
        vocabulary = self.dimensions.projection_parameters // self.dimensions.hidden if self.speaks else 0
        return memory.Network(self.dimensions, self.parameters, vocabulary)

    def with_shapes(
        self, shapes: Sequence[BlockShape], hidden: int | None = None, *, even: bool | None = None
    ) -> State:
        """With other blocks and another hidden size, which everything outside the blocks follows."""
        old = self.dimensions
        share = (hidden or old.hidden) / old.hidden
        new = dataclasses.replace(
            old,
            hidden=hidden or old.hidden,
            blocks=tuple(shapes),
            head_parameters=round(old.head_parameters * share**2),  # a dense layer, nearly all of it
            projection_parameters=round(old.projection_parameters * share),
        )
        before, after = (sum(all_block_parameters(shape, each) for shape in each.blocks) for each in (old, new))
        outside = round((self.parameters - before - old.head_parameters) * share) + new.head_parameters
        return State(new, outside + after, self.speaks, self.even if even is None else even)


def initial_state(place: Path, config: dict[str, Any], task: str, labels: int) -> State:
    """The network with its head: of a language model as it stands in the file, else a new one for `labels`.

    Every family's classifier is a dense layer (BERT's is its pooler) and a projection.
    """
    hidden, tensors = hidden_size(config), _tensors(place)
    if TASKS[task].has_classes:
        body = {name: math.prod(shape) for name, shape in tensors.items() if _is_body(name)}
        head = hidden * hidden + hidden * labels
        parameters, vocabulary = sum(body.values()) + head + hidden + labels, 0
    else:
        body = {name: math.prod(shape) for name, shape in tensors.items() if _is_parameter(name, tensors, config)}
        head, parameters, vocabulary = 0, sum(body.values()), _table_weights(body)
    shapes, family = block_shapes(config), family_of(config["model_type"])
    dimensions = Dimensions(
        hidden,
        head_size(config),
        shapes,
        head,
        vocabulary + sum(size for name, size in body.items() if name.endswith(_EVERY_TOKEN)),
        is_gated(config),
        queries_per_key(config),
        int(config[family.stacks[0].layers]) // len(shapes) if family.shared else 1,
    )
    return State(dimensions, parameters, not TASKS[task].has_classes)


def _tensors(place: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for file in weight_files(place) for name, shape in read_header(file).items()}


_HEADS = frozenset(
    {
        *("cls", "classifier", "decoder", "head", "pooler", "pre_classifier", "predictions", "qa_outputs"),
        *("discriminator_predictions", "generator_predictions", "mask_predictions", "lm_predictions"),
        *("generator_lm_head", "lm_head", "vocab_layer_norm", "vocab_projector", "vocab_transform"),
    }
)  # first or second part of a tensor's name


def _is_body(tensor: str) -> bool:
    """Whether a tensor is of the embeddings or a block; files also hold pretraining heads, and old ones buffers."""
    return not _HEADS & set(tensor.split(".")[:2]) and not tensor.endswith("position_ids")


_TABLES = (
    "lm_head.weight",
    "embed_out.weight",
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
)


_BUFFERS = ("position_ids", ".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", "final_logits_bias")


def _is_parameter(name: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a language model's tensor is a parameter of its own; older files hold tied ones twice."""
    shared = any(other.endswith("shared.weight") for other in tensors)
    twice = shared and name.endswith("embed_tokens.weight")
    tied = config.get("tie_word_embeddings") is True and name.endswith(_TABLES[:2])
    return not (twice or tied or name.endswith(_BUFFERS))


def _table_weights(body: Mapping[str, int]) -> int:
    """Weights of the table that gives logits: the head's own, else that of the embeddings."""
    return next((size for table in _TABLES for name, size in body.items() if name.endswith(table)), 0)
