"""A vector for a text: the mean of the network's last hidden states. What cleaning and collecting compare texts by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.model.checkpoint import Model
from moss_rlhf.progress import Progress
from moss_rlhf.tasks.batching import by_length, chunks, pad, padding_of

if TYPE_CHECKING:
    from torch import Tensor

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Texts → (texts, size) vectors of length 1."""

_LONGEST = 256  # tokens: what a text is about stands early, and time grows with them
_TOKENIZED_AT_ONCE = 2000


def open_embedder(model: str | Model) -> Embed:
    """A model, or its checkpoint or hub id, as what embeds; its head, trained or not, plays no part."""
    opened = model if isinstance(model, Model) else _body(model)
    return lambda texts: embed_texts(opened, texts)


def _body(model: str) -> Model:
    from moss_rlhf.model.checkpoint import load_pretrained
    from moss_rlhf.model.config import read_config, trained_labels
    from moss_rlhf.model.locate import locate
    from moss_rlhf.tasks import TASKS

    task, place = TASKS["text-classification"], locate(model)
    labels = trained_labels(read_config(place)) or ("0", "1")
    return load_pretrained(place, task.name, task.auto_class(), labels)


def embed_texts(
    model: Model,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """One vector a text, of length 1: mean-pooled last hidden states of the body, without the head.

    As sentence encoders pool (Reimers & Gurevych 2019, arXiv:1908.10084, §3). Of an encoder-decoder the encoder speaks.
    Computed in batches of similar lengths, in evaluation mode; nothing is trained.

    max_length   tokens read of each text; default 256, or what the model has positions for.
    returns      (texts, hidden size) float32, rows of L2 norm 1.
    """
    longest = min(max_length or _LONGEST, model.max_length)
    vectors = np.zeros((len(texts), model.anatomy.hidden_size), dtype=np.float32)
    with (progress or Progress(quiet=True)).bar("embedding texts", len(texts)) as bar:
        for start in range(0, len(texts), _TOKENIZED_AT_ONCE):
            part = list(texts[start : start + _TOKENIZED_AT_ONCE])
            for positions, pooled in _pooled_batches(model, part, longest, batch_size):
                vectors[start + np.array(positions)] = pooled
                bar.advance(len(positions))
    return vectors


def _pooled_batches(model: Model, texts: list[str], longest: int, batch_size: int) -> Any:
    """(positions, vectors) of each batch, the shortest texts first."""
    encoded = model.tokenizer(texts, truncation=True, max_length=longest, return_attention_mask=False)
    padding = padding_of(model.tokenizer)
    names = [name for name in padding if name != "attention_mask"]
    for positions in chunks(by_length([len(ids) for ids in encoded["input_ids"]]), batch_size):
        batch = pad([{name: encoded[name][position] for name in names} for position in positions], padding)
        yield positions, _embed_batch(model.network, batch)


def _embed_batch(network: Any, batch: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    import torch

    body = network.base_model
    encoder = body.get_encoder() if network.config.is_encoder_decoder else body
    device = next(network.parameters()).device
    inputs = {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        states = encoder(**inputs).last_hidden_state
    network.train(was_training)
    vectors: NDArray[np.float32] = mean_pool(states, inputs["attention_mask"]).cpu().numpy()
    return vectors


def mean_pool(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the places inside each text, of norm 1: (batch, length, hidden), (batch, length) → (batch, hidden)."""
    from torch.nn.functional import normalize

    inside = mask.unsqueeze(-1).to(states.dtype)
    return normalize((states * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1), dim=-1).float()
