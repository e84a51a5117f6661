"""The task of pretraining: rows are corrupted, and the network is to restore them.

It answers what the trainer asks of a task. What is drawn for a row is a function of (seed, epoch, row): a resumed
training sees the masks it would have seen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from moss_rlhf.errors import ModelError
from moss_rlhf.finetuning.corruption import (
    Ids,
    chosen_spans,
    chosen_tokens,
    infilled,
    masked,
    spans_replaced,
)
from moss_rlhf.finetuning.packing import Frame, Packed, frame_of
from moss_rlhf.recipe.pretraining import OBJECTIVES, Objective
from moss_rlhf.tasks.batching import chunks, pad
from moss_rlhf.tasks.language import IGNORED, perplexity

Kind = Objective
HELD_OUT_EPOCH = 2**31  # the masks of what is measured on, the same at every measurement
_MEAN_SPAN = 3.0  # tokens (T5)
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class Words:
    """What corrupting needs of a vocabulary."""

    frame: Frame
    ordinary: Ids  # ids of all tokens that are not special
    mask: int | None
    sentinels: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any) -> Words:
        vocabulary = tokenizer.get_vocab()
        special = {*tokenizer.all_special_ids}
        ordinary = np.array(sorted({*vocabulary.values()} - special), dtype=np.int64)
        found = [(re.fullmatch(r"▁?<extra_id_(\d+)>", token), index) for token, index in vocabulary.items()]
        numbered = sorted((int(match[1]), index) for match, index in found if match)
        return cls(frame_of(tokenizer), ordinary, tokenizer.mask_token_id, tuple(index for _, index in numbered))


def kind_for(objective: str, family_kind: str, words: Words) -> Kind:
    """What a network is trained to restore: as asked, or what suits its family and vocabulary.

    raises   ModelError where the family can't learn it, or the vocabulary lacks the tokens for it.
    """
    possible = OBJECTIVES[family_kind]
    if objective == "auto":
        objective = next((kind for kind in possible if not lacking(kind, words)), possible[0])
    if objective not in possible:
        raise ModelError(
            f"pretrain.objective: {objective!r} does not suit an {family_kind}; give {' or '.join(possible)}, or auto."
        )
    if lack := lacking(objective, words):
        raise ModelError(f"pretrain.objective: {objective} needs {lack}, which the model's vocabulary lacks.")
    return objective


def lacking(kind: str, words: Words) -> str:
    """What a vocabulary lacks for a kind, '' where nothing."""
    if kind in ("masked", "infilling") and words.mask is None:
        return "a mask token"
    return "sentinels such as <extra_id_0>" if kind == "spans" and len(words.sentinels) < 2 else ""


@dataclass(frozen=True)
class Restoring:
    """Rows, a network and a vocabulary: batches, their loss, and how well what is held out is restored.

    share   of the tokens that are masked, or in spans.
    """

    kind: Kind
    words: Words
    share: float
    whole_words: bool
    seed: int
    padding: int
    two_segments: bool = False  # whether the network is told of token types
    name: str = "pretraining"
    metric: str = "perplexity"
    lower_is_better: frozenset[str] = frozenset({"perplexity"})

    def room(self, length: int) -> int:
        """Tokens of a text in a row of `length`."""
        return length - self.words.frame.size

    def collate(self, rows: Sequence[Mapping[str, Any]], epoch: int) -> dict[str, Tensor]:
        """Rows as `Packed` gives them → one corrupted batch."""
        made = [self._row(row, np.random.default_rng((self.seed, epoch, row["row"]))) for row in rows]
        padding = {"input_ids": self.padding, "attention_mask": 0}
        batch = {name: torch.from_numpy(value) for name, value in pad(made, padding).items()}
        if self.two_segments:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        labels = torch.from_numpy(pad(made, {"labels": IGNORED})["labels"])
        return batch | {"labels": labels, "row": torch.tensor([row["row"] for row in rows])}

    def _row(self, row: Mapping[str, Any], random: np.random.Generator) -> dict[str, Any]:
        ids, before, after = row["ids"], self.words.frame.before, self.words.frame.after
        if self.kind == "causal":
            whole = [*before, *ids]
            return {"input_ids": whole, "labels": whole}
        if self.kind == "masked":
            shown, labels = self._masked(row, random)
            nothing = ([IGNORED] * len(before), [IGNORED] * len(after))
            return {"input_ids": [*before, *shown, *after], "labels": [*nothing[0], *labels, *nothing[1]]}
        chosen = chosen_spans(len(ids), self.share, _MEAN_SPAN, random) if len(ids) > 1 else np.zeros(1, bool)
        if self.kind == "infilling":
            shown, target = infilled(ids, chosen, int(self.words.mask or 0)), ids
            return {"input_ids": [*before, *shown, *after], "labels": [*before, *target, *after]}
        shown, target = spans_replaced(ids, chosen, self.words.sentinels)
        return {"input_ids": [*before, *shown, *after], "labels": [*target, *after]}

    def _masked(self, row: Mapping[str, Any], random: np.random.Generator) -> tuple[Ids, Ids]:
        chosen = np.zeros(len(row["ids"]), dtype=np.bool_)
        text = np.flatnonzero(~row["special"])
        if len(text):
            chosen[text] = chosen_tokens(row["starts"][text], self.share, self.whole_words, random)
        shown = masked(row["ids"], chosen, int(self.words.mask or 0), self.words.ordinary, random)
        return shown, np.where(chosen, row["ids"], IGNORED)

    passes = 1

    @property
    def shortest(self) -> int:
        """How many tokens of a text a row must have for anything to be foretold."""
        return 2 if self.kind == "causal" and not self.words.frame.before else 1

    def targets(self, labels: Tensor) -> int:
        """How many tokens a batch's loss counts."""
        return int(((labels[:, 1:] if self.kind == "causal" else labels) != IGNORED).sum())

    def answers(self, network: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (targets, vocabulary) and labels (targets,) of what is to be foretold."""
        given = {name: value for name, value in batch.items() if name not in ("labels", "row")}
        labels = batch["labels"]
        if self.kind == "masked":
            with _only_at(network.base_model, labels != IGNORED):
                logits = network(**given).logits[0]
            return logits, labels[labels != IGNORED]
        if self.kind == "causal":
            inside = batch["attention_mask"][:, 1:].bool()
            return network(**given, use_cache=False).logits[:, :-1][inside], labels[:, 1:][inside]
        shifted = network.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = network(**given, decoder_input_ids=shifted, use_cache=False).logits
        return logits[labels != IGNORED], labels[labels != IGNORED]

    def __call__(self, network: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch, (), float32."""
        logits, labels = self.answers(network, batch)
        return cross_entropy(logits.float(), labels)

    def measure(self, network: Any, rows: Packed) -> dict[str, float]:
        """{"loss", "perplexity", "accuracy"} over all targets of rows, the same masks each time; evaluation mode."""
        device = next(network.parameters()).device
        network.eval()
        sums = np.zeros(3)
        with torch.inference_mode():
            for positions in chunks(range(len(rows)), _ROWS_AT_ONCE):
                batch = self.collate([rows[position] for position in positions], HELD_OUT_EPOCH)
                logits, labels = self.answers(network, {name: value.to(device) for name, value in batch.items()})
                correct = (logits.argmax(dim=-1) == labels).sum()
                sums += [float(cross_entropy(logits.float(), labels, reduction="sum")), len(labels), float(correct)]
        if not sums[1]:
            return {"loss": math.nan, "perplexity": math.nan, "accuracy": math.nan}
        return {
            "loss": float(sums[0] / sums[1]),
            "perplexity": float(perplexity(sums)),
            "accuracy": float(sums[2] / sums[1]),
        }


@contextmanager
def _only_at(body: nn.Module, wanted: Tensor) -> Iterator[None]:
    """What stands above the body is given the states of these tokens alone: (1, tokens, hidden).

    A head over 30,000 words costs more than six blocks of 384; only one token in seven is foretold.
    """

    def select(_: nn.Module, __: Any, output: Any) -> Any:
        output["last_hidden_state"] = output["last_hidden_state"][wanted][None]
        return output

    handle = body.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()
