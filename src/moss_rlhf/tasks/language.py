"""What the tasks share whose answers are texts: losses and scores by token, padding of labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.model.anatomy import family_of
from moss_rlhf.model.config import KEY, read_config
from moss_rlhf.model.locate import locate
from moss_rlhf.model.runtime import Runtime, TranslatorRuntime
from moss_rlhf.tasks.batching import by_length, chunks

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # a label that no loss counts
_LARGEST_LOSS = 700.0  # exp of more is no float64; only broken weights lose as much a token
_ROWS_AT_ONCE = 16
_TOKENS_AT_ONCE = 1024  # their logits are 200 MB at 50,000 words, and three times as much with copies


def check_language_model(name: str, field: str) -> Path:
    """The directory of a causal language model; ModelError where it is none. Reads no weights."""
    place = locate(name, field)
    config = read_config(place)
    task = config.get(KEY, {}).get("task", "text-generation")
    if family_of(config["model_type"]).kind != "decoder" or task != "text-generation":
        raise ModelError(
            f"{field}: {name} is a {config['model_type']} for other tasks; give a causal language model, such as gpt2."
        )
    return place


def token_loss(logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy over target tokens, float32. logits (batch, length, vocabulary), labels (batch, length)."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction=reduction)


def at_targets(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the tokens that a loss counts: (batch, length, vocabulary) → (targets, vocabulary)."""
    return logits[labels != IGNORED]


def token_scores(task: Any, scorer: Scorer, encoded: Any, tokenizer: Any) -> NDArray[np.float64]:
    """(rows, 3): of each row Σ −log p of its target tokens, how many there are, and how many were the likeliest.

    Logits are never kept: one batch of them at a time. Computed in batches of similar lengths, returned in row order.

    raises   DataError where there are no rows.
    """
    import torch

    if not len(encoded):
        raise DataError(f"{task.name}: there are no rows to measure on; give at least one with a text.")

    order, parts = by_length(encoded["length"]), []
    with torch.inference_mode():
        for positions in chunks(order, min(_ROWS_AT_ONCE, max(1, _TOKENS_AT_ONCE // max(encoded["length"])))):
            parts.append(scorer(task.collate([encoded[position] for position in positions], tokenizer)))
    scores: NDArray[np.float64] = np.concatenate(parts)[np.argsort(order)]
    return scores


Scorer = Callable[[Mapping[str, Any]], NDArray[np.float64]]
"""Scores a batch as a task collates it: (rows, 3)."""


def network_scorer(task: Any, network: Any) -> Scorer:
    """By a network in PyTorch, where it is, in evaluation mode."""
    device = next(network.parameters()).device
    network.eval()

    def score(batch: Mapping[str, Tensor]) -> NDArray[np.float64]:
        there = {name: value.to(device) for name, value in batch.items()}
        logits = network(**task.inputs(network, there), use_cache=False).logits
        return _row_scores(*task.aligned(logits, there["labels"]))

    return score


def runtime_scorer(task: Any, runtime: Runtime) -> Scorer:
    """By a runtime file. One that translates tells no likeliest tokens: the third column is 0 then."""
    import torch

    def score(batch: Mapping[str, Tensor]) -> NDArray[np.float64]:
        answered = torch.from_numpy(runtime.run({name: value.numpy() for name, value in batch.items()}))
        if isinstance(runtime, TranslatorRuntime):
            return _scores_of_targets(answered, batch["labels"])
        return _row_scores(*task.aligned(answered, batch["labels"]))

    return score


def _scores_of_targets(log_probabilities: Tensor, labels: Tensor) -> NDArray[np.float64]:
    inside = labels != IGNORED
    sums = -log_probabilities.double().masked_fill(~inside, 0).sum(dim=1), inside.sum(dim=1)
    return np.column_stack([*(part.double().numpy() for part in sums), np.zeros(len(labels))])


def _row_scores(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    import torch

    inside = labels != IGNORED
    losses = token_loss(logits, labels, reduction="none").view(labels.shape)  # 0 where ignored
    correct = (logits.argmax(dim=-1) == labels) & inside
    columns = [part.double().sum(dim=1) for part in (losses, inside, correct)]
    scores: NDArray[np.float64] = torch.stack(columns, dim=1).cpu().numpy()
    return scores


def perplexity(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp(Σ −log p / tokens): (…, 3) sums of row scores → (…)."""
    value: NDArray[np.float64] = np.exp(np.minimum(sums[..., 0] / sums[..., 1], _LARGEST_LOSS))
    return value


def token_accuracy(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of target tokens that were the likeliest: (…, 3) sums of row scores → (…), 0 to 1."""
    value: NDArray[np.float64] = sums[..., 2] / sums[..., 1]
    return value


def mean_scores(scores: NDArray[np.float64]) -> dict[str, float]:
    """{"loss", "perplexity", "token_accuracy"} of all rows together."""
    sums = scores.sum(axis=0)
    loss = float(sums[0] / sums[1])
    return {"loss": loss, "perplexity": math.exp(min(loss, _LARGEST_LOSS)), "token_accuracy": float(sums[2] / sums[1])}


def encode_rows(rows: Any, encode_batch: Any, cache_file: str | None) -> Any:
    """Map a function over rows in batches, in place of their columns; cached in a file where one is given."""
    return rows.map(
        encode_batch,
        batched=True,
        batch_size=1000,
        remove_columns=rows.column_names,
        cache_file_name=cache_file,
        # the name of a function's bytes is no name of its meaning; the caller's cache file is
        new_fingerprint=None if cache_file is None else cache_file.rpartition("/")[2].replace(".", "-"),
    )


def sampled_lengths(rows: Any, column: str, tokenizer: Any, most: int, seed: int) -> NDArray[np.int64]:
    """Tokens of each text of a column, uncut; of a seeded sample of `most` rows."""
    order = np.random.default_rng(seed).permutation(len(rows))[:most]
    texts = rows.select(np.sort(order))[column][:]
    encoded = tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
    return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)


Row = Mapping[str, Any]
