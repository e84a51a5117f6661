"""Movement pruning: what goes is what fine-tuning moves towards zero (Sanh et al. 2020, arXiv:2005.07683).

Each weight of the blocks' matrices has a score S. The network computes with W' = W ⊙ M(S), and the mask's gradient is
passed straight through to the scores:

    dL/dS = dL/dW' ⊙ W        so S rises where a step would move W away from zero (dL/dW · W < 0), and falls where it
    dL/dW = dL/dW' ⊙ M        would shrink it.

    topv   M keeps the 1 − s(t) highest scores of every matrix; s(t) = sparsity · ramp(t).
    soft   M = [σ(S) > threshold · ramp(t)], and + regularisation · ramp(t) · mean σ(S) in the loss drives scores down:
           how much goes, and where, follows from the loss (their §3, "soft movement").

    ramp(t) = 1 − (1 − x)³, x = (t − begin) / (end − begin) cut to 0 … 1   (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moss_rlhf.finetuning.companions import Companion, Extra
from moss_rlhf.finetuning.options import Movement
from moss_rlhf.finetuning.regularisers import declare_pruned
from moss_rlhf.finetuning.seen import see, written
from moss_rlhf.model.checkpoint import Model


def cubic_ramp(step: int, first: int, last: int) -> float:
    """0 until step `first`, 1 from step `last` on, and 1 − (1 − x)³ between."""
    share = min(1.0, max(0.0, (step - first) / (last - first)))
    return 1 - (1 - share) ** 3


def lowest(score: Tensor, count: int) -> Tensor:
    """Marks the `count` lowest scores, bool of the same shape; of equal ones the earlier."""
    flat = score.flatten()
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    marked = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    marked[ties[: count - int(marked.sum())]] = True
    return marked.view_as(score)


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, weight: Tensor, score: Tensor, kept: Tensor) -> Tensor:
        context.save_for_backward(weight, kept)
        return weight * kept

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, kept = context.saved_tensors
        return gradient * kept, gradient * weight, None


def masked(weight: Tensor, score: Tensor, kept: Tensor) -> Tensor:
    """Weight ⊙ kept, whose gradient reaches the score as if it were the mask. All of one shape; kept is bool."""
    product: Tensor = _Masked.apply(weight, score, kept)  # type: ignore[no-untyped-call]
    return product


class MovementPruning(Companion):
    """Scores for every matrix of the blocks, and the masks that follow from them at each step."""

    name = "movement"
    alters_forward = True

    def __init__(self, model: Model, options: Movement, steps: int) -> None:
        self.model, self.options = model, options
        self.first = int(steps * options.begin)
        self.last = max(self.first + 1, round(steps * options.end))
        matrices = model.anatomy.matrices
        self.modules = [matrix.module for matrix in matrices]
        self.weights = [matrix.parameter for matrix in matrices]
        self.scores = [nn.Parameter(torch.zeros_like(weight)) for weight in self.weights]
        self.kept: list[Tensor] = []
        self.masked_for = -1
        self.handles: list[RemovableHandle] = []

    @property
    def settled(self) -> int:
        return self.last

    def extras(self) -> Sequence[Extra]:
        for score, weight in zip(self.scores, self.weights, strict=True):
            score.data = score.data.to(weight.device)
        return [Extra(score, self.options.score_learning_rate) for score in self.scores]

    def before_step(self, step: int) -> None:
        for score, weight in zip(self.scores, self.weights, strict=True):
            score.requires_grad_(weight.requires_grad)
        self._mask(step)
        if not self.handles:
            self._install()

    def penalty(self) -> Tensor | None:
        strength = self.options.regularisation or 0.0
        shown = [score.sigmoid().mean() for score in self.scores if score.requires_grad]
        if not strength or not shown:
            return None
        return strength * cubic_ramp(self.masked_for, self.first, self.last) * torch.stack(shown).mean()

    def after_step(self, step: int, rates: Sequence[float]) -> None:
        for score in self.scores:
            score.grad = None  # the trainer clears the network's gradients alone
        self._mask(step + 1)

    @contextmanager
    def as_shipped(self) -> Iterator[None]:
        pairs = zip(self.weights, self.kept, strict=True)
        with written(self.weights, [weight.detach() * kept for weight, kept in pairs]):
            yield

    def state(self) -> Mapping[str, Tensor]:
        return {str(index): score for index, score in enumerate(self.scores)}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        for index, score in enumerate(self.scores):
            score.copy_(state[str(index)])
        self.masked_for = -1

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def finish(self) -> dict[str, Any]:
        zeros = declare_pruned(self.model, self.weights)
        return {"movement_zeros": zeros, "movement_sparsity": zeros / sum(weight.numel() for weight in self.weights)}

    @torch.no_grad()
    def _mask(self, step: int) -> None:
        if self.masked_for == step:
            return
        ramp, pruned = cubic_ramp(step, self.first, self.last), {id(weight) for weight in self.model.pruned}
        self.kept = [
            self._kept(score.masked_fill(weight == 0, -torch.inf) if id(weight) in pruned else score, ramp)
            for score, weight in zip(self.scores, self.weights, strict=True)
        ]
        self.masked_for = step

    def _kept(self, score: Tensor, ramp: float) -> Tensor:
        if self.options.mode == "soft":
            return score.sigmoid() > (self.options.threshold or 0.1) * ramp
        return ~lowest(score, int(score.numel() * (self.options.sparsity or 0.0) * ramp))

    def _install(self) -> None:
        for index, module in enumerate(self.modules):
            self.handles.extend(see(module, partial(self._seen, index)))

    def _seen(self, index: int, weight: Tensor) -> Tensor:
        return masked(weight, self.scores[index], self.kept[index])
