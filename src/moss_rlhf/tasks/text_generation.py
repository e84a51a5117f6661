"""Text generation: a causal language model over documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data import Column
from moss_rlhf.model.runtime import Runtime
from moss_rlhf.tasks.batching import pad
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

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


class TextGeneration:
    """A document longer than the limit becomes several rows, and no two documents meet in a row.

    Each row begins with the last token of the one before: so every token but a document's first is foretold, once.
    """

    name = "text-generation"
    columns = (Column("text", "text"),)
    metric = "perplexity"
    metrics = {"perplexity": perplexity, "token_accuracy": token_accuracy}  # noqa: RUF012  # never changed
    lower_is_better = frozenset({"perplexity"})
    has_classes = False
    families = "decoder"
    cuts = False  # whether what is longer than max_length is lost

    def auto_class(self) -> Any:
        """The transformers class whose head fits."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    def encode(self, rows: Dataset, tokenizer: Any, max_length: int, cache_file: str | None = None) -> Dataset:
        """Tokenize: columns input_ids and length. Texts of one token, from which nothing can be learned, are left out.

        rows         column `text`.
        max_length   tokens of a row, at least 2; what is longer goes on in the next one.
        raises       ValueError on a shorter one.
        """
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2, a token and the next, got {max_length}")

        def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            texts = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
            cuts = [(ids, start) for ids in texts for start in range(0, len(ids) - 1, max_length - 1)]
            parts = [ids[start : start + max_length] for ids, start in cuts]
            return {"input_ids": parts, "length": [len(part) for part in parts]}

        return encode_rows(rows, encode_batch, cache_file)

    def lengths(self, rows: Dataset, tokenizer: Any, most: int, seed: int) -> NDArray[np.int64]:
        """Tokens of each text, uncut; of a seeded sample of `most` rows."""
        return sampled_lengths(rows, "text", tokenizer, most, seed)

    def longest(self, wanted: int | Literal["auto"], limit: int) -> int:
        """The most tokens of a row, where the model has positions for `limit`."""
        return longest_row(wanted, limit)

    def padding(self, tokenizer: Any) -> dict[str, int]:
        """What pads each column of token ids, in a batch for any of the runtimes."""
        return {"input_ids": tokenizer.pad_token_id, "attention_mask": 0}

    def collate(self, rows: Sequence[Row], tokenizer: Any) -> dict[str, Tensor]:
        """Encoded rows → one batch of tensors, padded on the right; labels are the inputs themselves."""
        import torch

        batch: dict[str, NDArray[Any]] = dict(pad(rows, self.padding(tokenizer)))
        batch["labels"] = np.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORED)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def pack(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Encoded rows → one row of all of them, (1, tokens), without padding and without sight of one another.

        Positions begin anew with each row, by which transformers' masks tell the rows apart where no attention mask is
        given; the first token of each row is nobody's to foretell.
        """
        import torch

        ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
        labels = [np.concatenate([[IGNORED], part[1:]]) for part in ids]
        positions = [np.arange(len(part)) for part in ids]
        parts = {"input_ids": ids, "position_ids": positions, "labels": labels}
        return {name: torch.from_numpy(np.concatenate(part))[None] for name, part in parts.items()}

    def inputs(self, network: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network is called with."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def aligned(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each position with the token that it is to foretell: the next one."""
        return logits[:, :-1], labels[:, 1:]

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy over target tokens, float32. logits (batch, length, vocabulary), labels (batch, length)."""
        return token_loss(*self.aligned(logits, labels), reduction)

    def targets(self, labels: Tensor) -> int:
        """How many tokens a loss over these labels counts."""
        return int((labels[:, 1:] != IGNORED).sum())

    def at_targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits that a loss counts, (targets, vocabulary)."""
        return at_targets(*self.aligned(logits, labels))

    def scores(self, network: Any, encoded: Dataset, tokenizer: Any) -> NDArray[np.float64]:
        """(rows, 3) row scores, of which `metrics` are functions."""
        return token_scores(self, network_scorer(self, network), encoded, tokenizer)

    def runtime_scores(self, runtime: Runtime, encoded: Dataset, tokenizer: Any) -> NDArray[np.float64]:
        """The same by a runtime file; a translator's third column is 0, for it tells no likeliest tokens."""
        return token_scores(self, runtime_scorer(self, runtime), encoded, tokenizer)

    def measure(self, network: Any, encoded: Dataset, tokenizer: Any) -> dict[str, float]:
        """Mean loss and metrics of encoded rows."""
        return mean_scores(self.scores(network, encoded, tokenizer))
