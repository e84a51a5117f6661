"""Make one block of several neighbours, by their weights alone or by what they do to calibration rows.

average         θ = (1/m) Σ θ_k
collapse        θ = θ_1 + Σ_{k>1} (θ_k − θ_1): the first block with all later ones' differences from it
                (Yang et al. 2024, LaCo, arXiv:2402.11187, §2)
least squares   one of the blocks, its matrices that write into the stream refitted so that it maps what enters
                the first block to what leaves the last. See `fit_block`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Block, Matrix, anatomy_of
from moss_rlhf.model.replay import without_cache
from moss_rlhf.optimization.block_states import (
    Batch,
    Trace,
    call_with,
    outputs_of,
    own_tokens,
    replaced,
    traced,
)

DAMPING = 0.1
"""Of the mean square of a feature. A few thousand tokens overfit with GPTQ's 0.01: see docs/shorten.md."""
_MOST_ROUNDS = 200  # of conjugate gradients


@dataclass(frozen=True)
class Merged:
    """One block made of several: it stands in `base`'s place and has these values in its parameters.

    error   mean squared difference from the states that were to be reached, per token; None where none were.
    """

    base: Block
    weights: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)
    error: float | None = None


# --- by the weights alone ------------------------------------------------------------------------------------------


def average(tensors: Sequence[Tensor]) -> Tensor:
    """The mean of tensors of one shape, in float64, given back in the first's dtype."""
    return torch.stack([tensor.double() for tensor in tensors]).mean(dim=0).to(tensors[0].dtype)


def collapse(tensors: Sequence[Tensor]) -> Tensor:
    """The first tensor plus every later one's difference from it (LaCo, arXiv:2402.11187, §2), in float64."""
    first = tensors[0].double()
    return (first + torch.stack([tensor.double() - first for tensor in tensors]).sum(dim=0)).to(tensors[0].dtype)


def merge_weights(members: Sequence[Block], formula: Callable[[Sequence[Tensor]], Tensor]) -> Merged:
    """Every parameter of the first block by a formula of all members' own; T5's position biases stay the first's.

    raises   ValueError where the blocks' parameters differ: see `hindrance`.
    """
    hindered = hindrance(members)
    if hindered:
        raise ValueError(hindered)
    own = [_parameters(block) for block in members]
    return Merged(members[0], {own[0][name]: formula([part[name].data for part in own]) for name in own[0]})


def hindrance(members: Sequence[Block]) -> str | None:
    """Why the weights of these blocks can't be put together, or None."""
    first = _parameters(members[0])
    for block in members[1:]:
        other = _parameters(block)
        for name in sorted(first.keys() ^ other.keys()):
            return f"{members[0].name} and {block.name} differ: only one of them has {name}"
        for name, parameter in first.items():
            if parameter.shape != other[name].shape:
                shapes = f"{tuple(parameter.shape)} and {tuple(other[name].shape)}"
                return f"{name} is {shapes} in {members[0].name} and {block.name}"
    return None


def _parameters(block: Block) -> dict[str, nn.Parameter]:
    """By their names in the block; without the position biases, which the lowest block holds for all."""
    tables = [attention.position_bias for attention in block.attentions]
    biases = {id(part) for table in tables if table is not None for part in table.parameters()}
    return {name: part for name, part in block.module.named_parameters() if id(part) not in biases}


# --- by what the blocks do -----------------------------------------------------------------------------------------


class Regression:
    """The sums that a linear fit needs: Δ, (out, in), and δ, (out,), such that Δ f + δ ≈ r over tokens (f, r).

    Ridge: Σ ‖r − Δ f − δ‖² + λ ‖Δ‖², λ = damping · the mean diagonal of the gram matrix of f. Without a bias δ = 0.
    """

    def __init__(self, matrix: Matrix) -> None:
        size = matrix.in_features
        self.has_bias, self.tokens = matrix.bias is not None, 0
        device = matrix.weight.device
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(matrix.out_features, size, dtype=torch.float64, device=device)
        self.of_features = torch.zeros(size, dtype=torch.float64, device=device)
        self.of_residuals = torch.zeros(matrix.out_features, dtype=torch.float64, device=device)
        self.squared = 0.0
        self._levels: tuple[Tensor, Tensor] | None = None  # near the means of features and residuals

    def add(self, features: Tensor, residuals: Tensor) -> None:
        """Count tokens: features (tokens, in), residuals (tokens, out)."""
        found, wanted = _at_least_float32(features), _at_least_float32(residuals)
        if not len(found):
            return
        if self.has_bias:  # products of what is near its mean lose no digits when the mean is taken off
            if self._levels is None:
                self._levels = found.mean(dim=0), wanted.mean(dim=0)
            found, wanted = found - self._levels[0], wanted - self._levels[1]
        self.tokens += len(found)
        self.gram += found.T @ found
        self.cross += wanted.T @ found
        self.of_features += found.sum(dim=0, dtype=torch.float64)
        self.of_residuals += wanted.sum(dim=0, dtype=torch.float64)
        self.squared += float(wanted.double().square().sum())

    def solve(self, damping: float, kept: Tensor | None = None) -> tuple[Tensor, Tensor | None, float]:
        """(Δ, δ or None, mean squared error per token). kept (out, in) bool: Δ is 0 elsewhere.

        raises   ValueError where no token was counted, or one was not finite.
        """
        if not self.tokens or not math.isfinite(self.squared) or not self.gram.diagonal().isfinite().all():
            raise ValueError(f"{self.tokens} tokens to fit to, and what enters or leaves the blocks must be finite")
        gram, cross, squared = self.gram, self.cross, self.squared
        if self.has_bias:
            gram = gram - self.of_features.outer(self.of_features) / self.tokens
            cross = cross - self.of_residuals.outer(self.of_features) / self.tokens
            squared -= float(self.of_residuals.square().sum()) / self.tokens
        change = ridge(gram, cross, damping, kept)
        error = squared - 2 * float((change * cross).sum()) + float(((change @ gram) * change).sum())
        return change, self._offset(change), max(error, 0.0) / self.tokens

    def _offset(self, change: Tensor) -> Tensor | None:
        if self._levels is None:
            return None
        of_features, of_residuals = self._levels
        wanted = of_residuals + self.of_residuals / self.tokens
        return wanted - change @ (of_features + self.of_features / self.tokens)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def ridge(gram: Tensor, cross: Tensor, damping: float, kept: Tensor | None = None) -> Tensor:
    """X of least tr(X G Xᵀ) − 2 tr(X Cᵀ) + λ ‖X‖², λ = damping · mean(diag G).

    gram     G (in, in), Σ f fᵀ; cross C (out, in), Σ r fᵀ; float64.
    kept     (out, in) bool: X is 0 elsewhere. None: nowhere.
    returns  (out, in) float64; zeros where all features are.
    """
    scale = gram.diagonal().mean()
    if scale <= 0:
        return torch.zeros_like(cross)
    damped = gram + damping * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if kept is not None and not kept.all():
        return _solve_where(damped, cross, kept)
    factor, failure = torch.linalg.cholesky_ex(damped)
    if failure:
        return ridge(gram, cross, max(10 * damping, 1e-8))
    return torch.cholesky_solve(cross.T, factor).T


def _solve_where(matrix: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """X, zero outside `kept`, with X A = C inside: conjugate gradients on all rows at once, scaled by A's diagonal."""
    diagonal = matrix.diagonal()
    found, left = torch.zeros_like(cross), cross * kept
    direction = left / diagonal
    size = (left * direction).sum(dim=1, keepdim=True)
    enough = 1e-20 * size
    for _ in range(_MOST_ROUNDS):
        if (size <= enough).all():
            break
        image = (direction @ matrix) * kept
        step = _ratio(size, (direction * image).sum(dim=1, keepdim=True))
        found, left = found + step * direction, left - step * image
        scaled = left / diagonal
        before, size = size, (left * scaled).sum(dim=1, keepdim=True)
        direction = scaled + _ratio(size, before) * direction
    return found


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0.0)


@torch.no_grad()
def fit_block(
    network: Any,
    batches: Iterable[Batch],
    members: Sequence[Block],
    pruned: Collection[nn.Parameter] = (),
    damping: float = DAMPING,
) -> Merged:
    """One of the members, refitted by ridge least squares to do what all of them do.

    Each member in turn is tried as the base, on what enters the first. Its attention's output projection is fitted to
    the sum of what all members' attentions write (cross-attention likewise), then, with that in place, its down
    projection to whatever is still missing from the stream at the last member's end. Where a norm closes the block
    (BERT's), the base gets the last member's, so that the stream before it is the target. Only changes are fitted and
    damped: where nothing is missing, the base stays as it is, bit for bit. The base of smallest error is taken.

    members   neighbours in one stack, in order.
    pruned    parameters whose zeros stay zeros.
    raises    ValueError on no batches, or states that are not finite.
    """
    anatomy, batches = anatomy_of(network), list(batches)
    if not batches:
        raise ValueError("fit_block needs at least one batch")
    network.eval()
    fits = [_Fit(base, members[-1], pruned) for base in members]
    for part in range(len(outputs_of(members[0]))):
        for fit in fits:
            fit.begin(part)
        for batch in batches:
            with without_cache(network):
                seen = _observe(network, members, batch)
                inside = own_tokens(anatomy, members[0], batch)
                for fit, member in zip(fits, seen, strict=True):
                    fit.count(part, seen, member, inside)
        for fit in fits:
            fit.finish(part, damping)
    best = min(fits, key=lambda fit: fit.error)
    return Merged(best.base, best.weights, best.error)


class _ReachedError(Exception):
    """The last block of interest has run."""


def _observe(network: Any, members: Sequence[Block], batch: Batch) -> list[Trace]:
    """Run the network up to the last member."""

    def stop(*_: Any) -> None:
        raise _ReachedError

    with traced(members, insides=True) as seen:
        handle = members[-1].module.register_forward_hook(stop)
        try:
            network(**batch[0])
        except _ReachedError:
            pass
        finally:
            handle.remove()
    return seen


class _Fit:
    """One base on its way."""

    def __init__(self, base: Block, last: Block, pruned: Collection[nn.Parameter]) -> None:
        self.base, self.last = base, last
        self.weights: dict[nn.Parameter, Tensor] = {}
        self.pruned = {id(parameter) for parameter in pruned}
        self.error = 0.0

    def begin(self, part: int) -> None:
        self.sums = Regression(outputs_of(self.base)[part])

    def count(self, part: int, seen: Sequence[Trace], own: Trace, inside: Tensor) -> None:
        """Run the base on what enters the first member, and count what it lacks."""
        self._close_like(seen[-1].closing)
        with replaced(self.weights), traced([self.base], insides=True) as (mine,):
            call_with(self.base, own.call, seen[0].entered)
        last = part == len(mine.written) - 1
        wanted = seen[-1].end if last else torch.stack([trace.written[part] for trace in seen]).sum(dim=0)
        reached = mine.end if last else mine.written[part]
        self.sums.add(_rows(mine.features[part], inside), _rows(wanted - reached, inside))

    def _close_like(self, closing: str) -> None:
        if closing and self.last is not self.base:
            own, other = (block.module.get_submodule(closing) for block in (self.base, self.last))
            for name, parameter in own.named_parameters():
                self.weights[parameter] = other.get_parameter(name).data.clone()

    def finish(self, part: int, damping: float) -> None:
        matrix = outputs_of(self.base)[part]
        kept = matrix.weight != 0 if id(matrix.parameter) in self.pruned else None
        change, offset, self.error = self.sums.solve(damping, kept)
        weight = (matrix.weight.double() + change).to(matrix.weight.dtype)
        self.weights[matrix.parameter] = weight.T.contiguous() if matrix.transposed else weight
        if offset is not None:
            bias: Any = matrix.module.bias
            self.weights[bias] = (bias.data.double() + offset).to(bias.dtype)


def _rows(values: Tensor, inside: Tensor) -> Tensor:
    return values.reshape(*inside.shape, -1)[inside]
