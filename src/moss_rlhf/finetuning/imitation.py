"""Learn what a teacher does inside: the states that leave its blocks, and which tokens its attentions relate.

Both are mean losses over pairs of layers and tokens that are no padding:

hidden states   ‖ W s / ‖W s‖ − t / ‖t‖ ‖², s the student's state of a token, t the teacher's: twice one minus their
                cosine (Sun et al. 2019, PKD, arXiv:1908.09355, eq. 7, there for the first token alone). W, where the
                hidden sizes differ, is learned along (Jiao et al. 2020, TinyBERT, arXiv:1909.10351, eq. 8); else none.
relations       KL(softmax(T Tᵀ / √d) ‖ softmax(S Sᵀ / √d')) of queries, of keys and of values, each split anew into as
                many relation heads in the student as in the teacher (Wang et al. 2021, MiniLMv2, arXiv:2012.15828,
                §3.1). So heads that were removed, and key-value heads that serve several, make no difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moss_rlhf.errors import ModelError
from moss_rlhf.finetuning.companions import Companion, Extra
from moss_rlhf.finetuning.objective import ROW_COLUMNS
from moss_rlhf.finetuning.options import Distillation
from moss_rlhf.finetuning.watching import Seen, watching
from moss_rlhf.model.anatomy import Anatomy, Attention, Block, anatomy_of
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.layer_map import Pair, layer_map
from moss_rlhf.tasks import TASKS, Task
from moss_rlhf.tasks.language import IGNORED

# --- the formulas --------------------------------------------------------------------------------------------------


def hidden_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over tokens of ‖s / ‖s‖ − t / ‖t‖‖², (), float32, between 0 and 4.

    student, teacher   (tokens, hidden) of one size; computed in float32.
    """
    difference = normalize(student.float(), dim=-1) - normalize(teacher.float(), dim=-1)
    return difference.square().sum(dim=-1).mean()


def relation_loss(student: Tensor, teacher: Tensor, heads: int, inside: Tensor, causal: bool) -> Tensor:
    """Mean over rows, relation heads and tokens of KL(teacher's relations ‖ student's), (), float32.

    student, teacher   (rows, length, features): queries, keys or values; the numbers of features may differ.
    heads              relation heads, a divisor of both.
    inside             (rows, length) bool, True on tokens that are no padding.
    causal             whether a token relates to itself and earlier ones alone.
    """
    own, taught = (_log_relations(part, heads, inside, causal) for part in (student, teacher))
    divergence = (taught.exp() * (taught - own)).sum(dim=-1)  # (rows, heads, length)
    return divergence.movedim(1, -1)[inside].mean()


def _log_relations(part: Tensor, heads: int, inside: Tensor, causal: bool) -> Tensor:
    """(rows, heads, length, length) log-probabilities."""
    split = part.float().view(*part.shape[:-1], heads, -1).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(split.shape[-1])
    allowed = inside[:, None, None, :].expand_as(scores)
    if causal:
        allowed = allowed.tril()
    lowest = torch.finfo(scores.dtype).min / 2  # finite: 0 · (lowest − lowest) is 0
    return scores.masked_fill(~allowed, lowest).log_softmax(dim=-1)


def relation_heads(widths: Sequence[int], most: int) -> int:
    """The largest common divisor of the numbers of features that is at most `most`."""
    common = math.gcd(*widths)
    return max(count for count in range(1, most + 1) if common % count == 0)


# --- the teacher ---------------------------------------------------------------------------------------------------


class Tutor:
    """A teacher that is asked at every step, once a batch whoever asks.

    ask   calls the network where it is not called with the student's token ids.
    """

    def __init__(self, network: Any, ask: Callable[..., Any] | None = None) -> None:
        self.network, self.anatomy, self._ask = network, anatomy_of(network), ask or network
        self._asked: Tensor | None = None
        self._outputs: Any = None

    @torch.no_grad()
    def __call__(self, **given: Any) -> Any:
        if given["input_ids"] is not self._asked:
            self._asked, self._outputs = given["input_ids"], self._ask(**given)
        return self._outputs

    @contextmanager
    def watched(self, layers: Sequence[int], states: bool, parts: bool) -> Iterator[Seen]:
        """Its next run is seen."""
        self._asked = None
        with watching(self.anatomy, layers, states, parts) as seen:
            yield seen


# --- the companion -------------------------------------------------------------------------------------------------


class Imitation(Companion):
    """Adds hidden · the loss of hidden states + attention · that of relations to every batch's loss.

    raises   ModelError where layers can't be paired, or relation heads don't divide what they are to split.
    """

    name = "imitation"

    def __init__(self, model: Model, tutor: Tutor, options: Distillation, learning_rate: float, seed: int) -> None:
        self.network, self.anatomy, self.tutor, self.options = model.network, model.anatomy, tutor, options
        self.task: Task = TASKS[model.task]
        self.pairs = layer_map(self.anatomy, tutor.anatomy, options.layers)
        self.heads = [_heads_of(self._attentions(pair), options.relation_heads) for pair in self.pairs]
        self.projection = self._projection(learning_rate, seed)
        self._seen, self._taught = Seen(self.anatomy), Seen(tutor.anatomy)
        self._batch: Mapping[str, Tensor] = {}

    def _attentions(self, pair: Pair) -> tuple[Attention, Attention]:
        own, other = _block(self.anatomy, pair[0]), _block(self.tutor.anatomy, pair[1])
        return own.attention, other.attention

    def _projection(self, learning_rate: float, seed: int) -> Extra | None:
        """From the student's hidden size to the teacher's, at first with orthogonal rows or columns."""
        sizes = self.tutor.anatomy.hidden_size, self.anatomy.hidden_size
        if sizes[0] == sizes[1] or not self.options.hidden:
            return None
        random = torch.Generator().manual_seed(seed)
        weight = nn.init.orthogonal_(torch.empty(*sizes), generator=random)
        return Extra(nn.Parameter(weight.to(next(self.tutor.network.parameters()).device)), learning_rate)

    def extras(self) -> Sequence[Extra]:
        return [self.projection] if self.projection else []

    def state(self) -> Mapping[str, Tensor]:
        return {"projection": self.projection.parameter} if self.projection else {}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        if self.projection:
            self.projection.parameter.copy_(state["projection"])

    @contextmanager
    def around(self, batch: Mapping[str, Tensor]) -> Iterator[None]:
        states, parts = bool(self.options.hidden), bool(self.options.attention)
        own, other = zip(*self.pairs, strict=True)
        inputs = {name: value for name, value in batch.items() if name not in ROW_COLUMNS}
        with self.tutor.watched(other, states, parts) as self._taught:
            self.tutor(**self.task.inputs(self.network, inputs))
        self._batch = batch
        with watching(self.anatomy, own, states, parts) as self._seen:
            yield

    def penalty(self) -> Tensor:
        with torch.autocast(self._batch["labels"].device.type, enabled=False):
            losses = [self._pair_loss(pair, heads) for pair, heads in zip(self.pairs, self.heads, strict=True)]
        return torch.stack(losses).mean()

    def _pair_loss(self, pair: Pair, heads: int) -> Tensor:
        inside, losses = self._own_tokens(pair[0]), []
        if self.options.hidden:
            state = self._seen.state(pair[0])[inside].float()
            mapped = state @ self.projection.parameter.T if self.projection else state
            losses.append(self.options.hidden * hidden_loss(mapped, self._taught.state(pair[1])[inside]))
        if self.options.attention:
            causal = _block(self.anatomy, pair[0]).stack == "decoder"
            parts = zip(self._seen.parts(pair[0]), self._taught.parts(pair[1]), strict=True)
            relations = [relation_loss(own, other, heads, inside, causal) for own, other in parts]
            losses.append(self.options.attention * torch.stack(relations).mean())
        return torch.stack(losses).sum()

    def _own_tokens(self, layer: int) -> Tensor:
        """(rows, length) bool: of a decoder beside an encoder the targets."""
        if len(self.anatomy.family.stacks) > 1 and _block(self.anatomy, layer).stack == "decoder":
            return self._batch["labels"] != IGNORED
        return self._batch["attention_mask"].bool()

    def finish(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"taught_layers": [list(pair) for pair in self.pairs]}
        if self.options.attention:
            facts["relation_heads"] = self.heads
        if self.projection:
            facts["taught_through"] = "a learned projection, {1} → {0}".format(*self.projection.parameter.shape)
        return facts


def _block(anatomy: Anatomy, layer: int) -> Block:
    return anatomy.blocks[0 if anatomy.repeats > 1 else layer]


def _heads_of(attentions: Sequence[Attention], asked: int | Literal["auto"]) -> int:
    """How many relation heads the two are split into: as asked, else what divides both, up to the teacher's heads."""
    widths = [width for attention in attentions for width in _widths(attention)]
    if asked == "auto":
        return relation_heads(widths, attentions[1].heads)
    if any(width % asked for width in widths):
        raise ModelError(
            f"finetune.distill.relation_heads: {asked} does not divide {', '.join(map(str, sorted(set(widths))))}, the "
            f"features of the student's and the teacher's projections. Give a divisor of {math.gcd(*widths)}, or auto."
        )
    return asked


def _widths(attention: Attention) -> tuple[int, ...]:
    """Features of the queries, and of keys and values."""
    return attention.heads * attention.head_size, attention.key_value_heads * attention.head_size
