"""Penalties on the weights. All act on matrices, never on biases and norms, and never on frozen weights.

l2         + λ/2 Σ w² in the loss: its gradient λ w passes through the optimizer (weight_decay of adamw does not). The
           embedding tables are left out: a row that no batch reads gets nothing but the penalty, and Adam, which
           divides by the gradient's own size, makes a full step of it every time.
l2_start   + λ/2 Σ (w − w₀)², w₀ the weights at the start; below the head (Li et al. 2018, arXiv:1802.01483, eq. 2).
l1         λ Σ |w| by a proximal step after the optimizer's: w ← sign(w) · max(|w| − η λ, 0), η the rate of the weight's
           layer (Parikh & Boyd 2014, §6.5.2). Weights become exactly zero, as no subgradient would make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.finetuning.companions import Companion
from moss_rlhf.finetuning.layers import LayerGroup
from moss_rlhf.model.checkpoint import Model


def soft_threshold(weight: Tensor, threshold: float) -> Tensor:
    """sign(w) · max(|w| − threshold, 0), the proximal map of threshold · |w|; any shape."""
    return weight - weight.clamp(-threshold, threshold)


class Ridge(Companion):
    """`strength` / 2 · Σ w² over the matrices above the embeddings."""

    name = "l2"

    def __init__(self, groups: Sequence[LayerGroup], strength: float) -> None:
        self.weights, self.strength = _matrices(groups[1:]), strength

    def penalty(self) -> Tensor | None:
        squares = [torch.linalg.vector_norm(weight) ** 2 for weight in self.weights if weight.requires_grad]
        return self.strength / 2 * torch.stack(squares).sum() if squares else None


class TowardsStart(Companion):
    """`strength` / 2 · Σ (w − w₀)² over the matrices below the head.

    w₀ are the weights now: a resumed training is given the network as it was at first, and only then the checkpoint.
    """

    name = "l2_start"

    def __init__(self, groups: Sequence[LayerGroup], strength: float) -> None:
        self.weights, self.strength = _matrices(groups[:-1]), strength
        self.start = [weight.detach().clone() for weight in self.weights]

    def penalty(self) -> Tensor | None:
        self.start = [start.to(weight.device) for start, weight in zip(self.start, self.weights, strict=True)]
        pairs = zip(self.weights, self.start, strict=True)
        squares = [torch.linalg.vector_norm(weight - start) ** 2 for weight, start in pairs if weight.requires_grad]
        return self.strength / 2 * torch.stack(squares).sum() if squares else None


class Lasso(Companion):
    """`strength` · Σ |w| over the blocks' matrices; what ends at zero counts as pruned."""

    name = "l1"

    def __init__(self, model: Model, groups: Sequence[LayerGroup], strength: float) -> None:
        self.model, self.strength = model, strength
        matrices = {id(matrix.parameter) for matrix in model.anatomy.matrices}
        self.weights = [
            (index, parameter)
            for index, group in enumerate(groups)
            for _, parameter in group.parameters
            if id(parameter) in matrices
        ]

    @torch.no_grad()
    def after_step(self, step: int, rates: Sequence[float]) -> None:
        for group, weight in self.weights:
            if weight.requires_grad:
                weight.copy_(soft_threshold(weight, rates[group] * self.strength))

    def finish(self) -> dict[str, Any]:
        weights = [weight for _, weight in self.weights]
        zeros = declare_pruned(self.model, weights)
        return {"l1_zeros": zeros, "l1_sparsity": zeros / sum(weight.numel() for weight in weights)}


def declare_pruned(model: Model, weights: Sequence[nn.Parameter]) -> int:
    """Count those that hold zeros among the model's pruned ones, so that the zeros stay; returns how many zeros."""
    known, total = {id(parameter) for parameter in model.pruned}, 0
    for weight in weights:
        zeros = weight.numel() - int(torch.count_nonzero(weight))
        total += zeros
        if zeros and id(weight) not in known:
            model.pruned.append(weight)
    return total


def _matrices(groups: Sequence[LayerGroup]) -> list[nn.Parameter]:
    return [parameter for group in groups for _, parameter in group.parameters if parameter.dim() > 1]
