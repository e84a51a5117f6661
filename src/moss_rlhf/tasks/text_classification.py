"""Text classification: one text, one label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from moss_rlhf.data import Column
from moss_rlhf.model.cutting import Cut, Keep, pool_windows
from moss_rlhf.model.runtime import Runtime, TorchRuntime
from moss_rlhf.tasks.batching import by_length, chunks, pad, padding_of
from moss_rlhf.tasks.calibration import expected_calibration_error, log_loss
from moss_rlhf.tasks.metrics import Metric, accuracy, confusion, macro_f1

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_TOKENIZED_AT_ONCE = 1000


class TextClassification:
    """What the other rooms ask of the task.

    families   the kind of network that serves it: encoder, decoder, encoder-decoder.
    """

    name = "text-classification"
    columns = (Column("text", "text"), Column("label", "label"))
    metric = "accuracy"
    metrics: Mapping[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1}
    probability_metrics: Mapping[str, Metric] = {
        "log_loss": log_loss,
        "expected_calibration_error": expected_calibration_error,
    }
    lower_is_better: frozenset[str] = frozenset(probability_metrics)
    has_classes = True
    families = "encoder"
    cuts = True  # whether what is longer than max_length is lost

    def auto_class(self) -> Any:
        """The transformers class whose head fits."""
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def encode(
        self, rows: Dataset, tokenizer: Any, max_length: int, cache_file: str | None = None, keep: Keep = "head"
    ) -> Dataset:
        """Tokenize: columns input_ids, token_type_ids where the tokenizer makes them, length, and labels where known.

        rows         columns `text` and, optionally, `label` (class ids).
        max_length   tokens of a row, special ones included.
        keep         which tokens of a longer text; "windows" makes several rows of it, and a column `row` that says
                     which text each is of.
        """
        padding = padding_of(tokenizer)
        if keep != "head":
            return self._encode_cut(rows, tokenizer, Cut(keep, max_length), cache_file)

        def encode_batch(batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
            encoded = tokenizer(batch["text"], truncation=True, max_length=max_length, return_attention_mask=False)
            columns = {name: encoded[name] for name in padding if name != "attention_mask"}
            labels = {"labels": batch["label"]} if "label" in batch else {}
            return {**columns, **labels, "length": [len(ids) for ids in columns["input_ids"]]}

        return rows.map(
            encode_batch,
            batched=True,
            batch_size=_TOKENIZED_AT_ONCE,
            remove_columns=rows.column_names,
            cache_file_name=cache_file,
            # the name of a function's bytes is no name of its meaning; the caller's cache file is
            new_fingerprint=None if cache_file is None else cache_file.rpartition("/")[2].replace(".", "-"),
        )

    def _encode_cut(self, rows: Dataset, tokenizer: Any, cut: Cut, cache_file: str | None) -> Dataset:
        names = [name for name in padding_of(tokenizer) if name != "attention_mask"]
        return rows.map(
            lambda batch, numbers: _cut_batch(batch, numbers, tokenizer, names, cut),
            batched=True,
            with_indices=True,
            batch_size=_TOKENIZED_AT_ONCE,
            remove_columns=rows.column_names,
            cache_file_name=cache_file,
            new_fingerprint=None if cache_file is None else cache_file.rpartition("/")[2].replace(".", "-"),
        )

    def labels(self, encoded: Dataset) -> NDArray[np.int64]:
        """The class id of each text, (texts,), in their order: of windows, each text's once."""
        labels = np.asarray(encoded["labels"], dtype=np.int64)
        return labels if "row" not in encoded.column_names else labels[_firsts(encoded)]

    def text_of(self, encoded: Dataset) -> NDArray[np.int64]:
        """Which text each row is of, counted from 0, (rows,): the row itself, or of windows the text that they cut."""
        if "row" not in encoded.column_names:
            return np.arange(len(encoded))
        return np.unique(np.asarray(encoded["row"]), return_inverse=True)[1]

    def texts(self, encoded: Dataset) -> int:
        """How many texts the encoded rows are of."""
        return len(_firsts(encoded)) if "row" in encoded.column_names else len(encoded)

    def lengths(self, rows: Dataset, tokenizer: Any, most: int, seed: int) -> NDArray[np.int64]:
        """Tokens of each text, uncut, special tokens included; of a seeded sample of `most` rows."""
        order = np.random.default_rng(seed).permutation(len(rows))[:most]
        texts = rows.select(np.sort(order))["text"][:]
        encoded = tokenizer(texts, truncation=False, return_attention_mask=False, verbose=False)
        return np.array([len(ids) for ids in encoded["input_ids"]], dtype=np.int64)

    def longest(self, wanted: int | Literal["auto"], limit: int) -> int:
        """The most tokens of a row, where the model has positions for `limit`."""
        return limit

    def padding(self, tokenizer: Any) -> dict[str, int]:
        """What pads each column of token ids, in a batch for any of the runtimes."""
        return padding_of(tokenizer)

    def collate(self, rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> dict[str, Tensor]:
        """Encoded rows → one batch of tensors, labels included where known."""
        import torch

        batch: dict[str, NDArray[Any]] = dict(pad(rows, self.padding(tokenizer)))
        if "labels" in rows[0]:
            batch["labels"] = np.array([row["labels"] for row in rows], dtype=np.int64)
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def inputs(self, network: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the network is called with."""
        return {name: value for name, value in batch.items() if name != "labels"}

    def targets(self, labels: Tensor) -> int:
        """How many labels a loss counts: one a row."""
        return len(labels)

    def at_targets(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The logits that a loss counts: every row's."""
        return logits

    def measure(self, network: Any, encoded: Dataset, tokenizer: Any) -> dict[str, float]:
        """Mean loss and metrics of encoded rows."""
        import torch

        logits, labels = self.predict(TorchRuntime(network), encoded, tokenizer), self.labels(encoded)
        loss = float(self.loss(torch.from_numpy(logits), torch.from_numpy(labels)))
        counts = confusion(labels, self.answers(logits), logits.shape[1])
        return {"loss": loss} | {name: float(metric(counts)) for name, metric in self.metrics.items()}

    def loss(self, logits: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """Cross-entropy in float32. logits (batch, classes), labels (batch,)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(logits.float(), labels, reduction=reduction)

    def predict(self, runtime: Runtime, encoded: Dataset, tokenizer: Any, batch_size: int = 32) -> NDArray[np.float32]:
        """Logits (texts, classes) in the rows' order; computed in batches of similar lengths, pooled over windows."""
        padding = self.padding(tokenizer)
        logits: list[NDArray[np.float32]] = []
        order = by_length(encoded["length"])
        for positions in chunks(order, batch_size):
            rows = encoded[positions]
            batch = pad([dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)], padding)
            logits.append(runtime.run(batch))
        result = np.concatenate(logits)[np.argsort(order)]
        return pool_windows(result, np.asarray(encoded["row"])) if "row" in encoded.column_names else result

    def answers(self, logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Class ids, (rows,)."""
        ids: NDArray[np.int64] = logits.argmax(axis=1).astype(np.int64)
        return ids


def _cut_batch(
    batch: Mapping[str, list[Any]], numbers: Sequence[int], tokenizer: Any, names: Sequence[str], cut: Cut
) -> dict[str, list[Any]]:
    """Tokenize a batch of texts uncut, then keep what the cut says; a window a row."""
    encoded = tokenizer(batch["text"], return_attention_mask=False, return_special_tokens_mask=True, verbose=False)
    kept = [(text, places) for text, mask in enumerate(encoded["special_tokens_mask"]) for places in cut.rows(mask)]
    columns = {name: [[encoded[name][text][place] for place in places] for text, places in kept] for name in names}
    labels = {"labels": [batch["label"][text] for text, _ in kept]} if "label" in batch else {}
    windows = {"row": [numbers[text] for text, _ in kept]} if cut.keep == "windows" else {}
    return {**columns, **labels, **windows, "length": [len(places) for _, places in kept]}


def _firsts(encoded: Dataset) -> NDArray[np.int64]:
    """The position of each text's first window."""
    _, firsts = np.unique(np.asarray(encoded["row"]), return_index=True)
    return firsts
