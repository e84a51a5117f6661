"""Translation, or any other pair of texts: an encoder-decoder reads the source and writes the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data import Column
from moss_rlhf.model.runtime import Runtime, Writer
from moss_rlhf.tasks.batching import by_length, chunks, pad
from moss_rlhf.tasks.language import (
    IGNORED,
    Row,
    at_targets,
    encode_rows,
    mean_scores,
    network_scorer,
    perplexity,
    runtime_scorer,
    sampled_lengths,
    token_accuracy,
    token_loss,
    token_scores,
)
from moss_rlhf.tasks.lengths import longest_row
from moss_rlhf.tasks.overlap import bleu, chrf

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_WRITTEN_AT_ONCE = 32  # rows


class Translation:
    """The decoder is given the target shifted right by one, after the token that starts it."""

    name = "translation"
    columns = (Column("source", "text"), Column("target", "text"))
    metric = "perplexity"
    metrics = {"perplexity": perplexity, "token_accuracy": token_accuracy}  # noqa: RUF012  # never changed
    written_metrics = {"bleu": bleu, "chrf": chrf}  # noqa: RUF012  # of what it writes by itself
    lower_is_better = frozenset({"perplexity"})
    has_classes = False
    families = "encoder-decoder"
    cuts = True  # whether what is longer than max_length is lost

    def auto_class(self) -> Any:
        """The transformers class whose head fits."""
        from transformers import AutoModelForSeq2SeqLM

        return AutoModelForSeq2SeqLM

    def encode(self, rows: Dataset, tokenizer: Any, max_length: int, cache_file: str | None = None) -> Dataset:
        """Tokenize: columns input_ids, labels (the target's tokens) and length (of the longer of both).

        rows         columns `source` and `target`.
        max_length   tokens kept of each text, special tokens included; the tail is cut.
        """
        limits = {"truncation": True, "max_length": max_length, "return_attention_mask": False}

        def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            sources = tokenizer(batch["source"], **limits)["input_ids"]
            targets = tokenizer(text_target=batch["target"], **limits)["input_ids"]
            longest = [max(map(len, pair)) for pair in zip(sources, targets, strict=True)]
            return {"input_ids": sources, "labels": targets, "length": longest}

        return encode_rows(rows, encode_batch, cache_file)

    def lengths(self, rows: Dataset, tokenizer: Any, most: int, seed: int) -> NDArray[Any]:
        """Tokens of the longer of source and target, uncut; of a seeded sample of `most` rows."""
        source, target = (sampled_lengths(rows, column, tokenizer, most, seed) for column in ("source", "target"))
        return np.maximum(source, target)

    def longest(self, wanted: int | Literal["auto"], limit: int) -> int:
        """The most tokens of a row, where the model has positions for `limit`."""
        return longest_row(wanted, limit)

    def padding(self, tokenizer: Any) -> dict[str, int]:
        """What pads each column of token ids, in a batch for any of the runtimes."""
        return {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "labels": IGNORED}

    def collate(self, rows: Sequence[Row], tokenizer: Any) -> dict[str, Tensor]:
        """Encoded rows → one batch of tensors, padded on the right."""
        import torch

        return {name: torch.from_numpy(values) for name, values in pad(rows, self.padding(tokenizer)).items()}

    def inputs(self, network: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network is called with: the decoder reads the target shifted right, by the network's own rule."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        return given | {"decoder_input_ids": network.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each position with the token that it is to foretell: its own, for the inputs are shifted."""
        return logits, labels

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy over target tokens, float32. logits (batch, length, vocabulary), labels (batch, length)."""
        return token_loss(logits, labels, reduction)

    def targets(self, labels: Tensor) -> int:
        """How many tokens a loss over these labels counts."""
        return int((labels != IGNORED).sum())

    def at_targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits that a loss counts, (targets, vocabulary)."""
        return at_targets(logits, labels)

    def scores(self, network: Any, encoded: Dataset, tokenizer: Any) -> NDArray[Any]:
        """(rows, 3) row scores, of which `metrics` are functions."""
        return token_scores(self, network_scorer(self, network), encoded, tokenizer)

    def runtime_scores(self, runtime: Runtime, encoded: Dataset, tokenizer: Any) -> NDArray[np.float64]:
        """The same by a runtime file; a translator's third column is 0, for it tells no likeliest tokens."""
        return token_scores(self, runtime_scorer(self, runtime), encoded, tokenizer)

    def write(self, runtime: Writer, encoded: Dataset, tokenizer: Any, most: int) -> list[str]:
        """What a runtime makes of each source, greedily and of at most `most` tokens; in row order."""
        order, texts = by_length(encoded["length"]), [""] * len(encoded)
        for positions in chunks(order, _WRITTEN_AT_ONCE):
            batch = pad([encoded[position] for position in positions], self.padding(tokenizer))
            written = tokenizer.batch_decode(runtime.write(batch, most), skip_special_tokens=True)
            for position, text in zip(positions, written, strict=True):
                texts[position] = text.strip()
        return texts

    def measure(self, network: Any, encoded: Dataset, tokenizer: Any) -> dict[str, float]:
        """Mean loss and metrics of encoded rows."""
        return mean_scores(self.scores(network, encoded, tokenizer))
