"""Refit what a cut left, without training: each part's output matrix by least squares on calibration texts.

When units of a part went, the columns that stay of its output matrix W can make up for some of what they wrote.
Block by block, with x (features) what enters W in the cut network, whose earlier parts are repaired already, and t
what W has to write so that the stream (the hidden states that the part adds to) is the uncut network's,

    min over W, b   Σ_tokens w ‖W x + b − t‖²  +  λ ‖W − W_cut‖²

The masks' tuning of Kwon et al. 2022 (arXiv:2204.09656, §4.3) is the special case of one scale a unit; the asymmetry
(inputs of the cut network against the stream of the uncut one) is that of Nagel et al. 2020 (arXiv:2004.10568, §4.3)
and keeps errors from piling up. Solved with torch.linalg from Gram matrices, so memory does not grow with the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Block, Matrix
from moss_rlhf.model.replay import Batch, Replay, first
from moss_rlhf.optimization.block_states import own_tokens
from moss_rlhf.optimization.unit_scores import Part, block_parts
from moss_rlhf.progress import Progress


@dataclass
class Moments:
    """Second moments of features x, (f,), and targets t, (out,), over weighted tokens; float64 sums on the CPU.

    gram    (f, f) Σ w x xᵀ;   cross (f, out) Σ w x tᵀ;   square Σ w ‖t‖²
    """

    gram: Tensor
    cross: Tensor
    square: float = 0.0

    @classmethod
    def empty(cls, features: int, outputs: int) -> Moments:
        return cls(torch.zeros(features, features), torch.zeros(features, outputs))

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Count tokens: features (tokens, f), targets (tokens, out), weights (tokens,)."""
        weighted = (features * weights[:, None]).T
        self.gram += (weighted @ features).cpu()
        self.cross += (weighted @ targets).cpu()
        self.square += float((targets.double().square().sum(dim=1) * weights).sum())

    def error(self, weight: Tensor) -> float:
        """Σ w ‖W x − t‖² of a weight, (out, f)."""
        w = weight.double()
        inside = (w @ self.gram.double() * w).sum() - 2 * (w.T * self.cross.double()).sum()
        return max(0.0, float(inside) + self.square)


def refit(moments: Moments, weight: Tensor, ridge: float) -> Tensor:
    """The weight, (out, f), that solves the ridge least squares above, near the present one.

    ridge    λ as a share of the mean squared feature, > 0; it holds the solution where texts are few.
    """
    gram = moments.gram.double()
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    missing = moments.cross.double() - gram @ weight.double().T
    return (weight.double() + torch.linalg.solve(damped, missing).T).to(weight.dtype)


# --- in a network --------------------------------------------------------------------------------------------------


@dataclass
class _Written:
    """One run of a block: what each part's output matrix read and wrote, and the stream that it adds to."""

    features: dict[str, Tensor] = field(default_factory=dict)  # by kind
    written: dict[str, Tensor] = field(default_factory=dict)
    read: dict[str, Tensor] = field(default_factory=dict)
    entered: Tensor = field(default_factory=lambda: torch.empty(0))
    left: Tensor = field(default_factory=lambda: torch.empty(0))

    def stream(self, kind: str) -> Tensor:
        """What the part's output is added to.

        Where what left the block is what entered plus what was written, nothing is normed on the way; else every sum
        is (BERT's kind), and a part adds to what it reads.
        """
        shape = self.entered.shape
        total = self.entered + sum(value.reshape(shape) for value in self.written.values())
        if not torch.allclose(total, self.left, rtol=1e-3, atol=1e-4 * float(self.left.abs().max())):
            return self.read[kind].reshape(shape)
        before = list(self.written)[: list(self.written).index(kind)]
        return self.entered + sum((self.written[name].reshape(shape) for name in before), torch.zeros(()))


def _run(replay: Replay, position: int, batch: int) -> _Written:
    """Run a block of a replayed network on a batch and keep what its parts did."""
    block, run = replay.blocks[position], _Written()
    args, kwargs = replay.inputs(position, batch)
    with ExitStack() as hooks:
        for part, whole in zip(block_parts(block), block.parts, strict=True):
            hooks.callback(part.output.module.register_forward_hook(_writer(run, part.kind)).remove)
            hooks.callback(whole.matrices[0].module.register_forward_pre_hook(_reader(run, part.kind)).remove)
        run.entered = args[0] if args else kwargs["hidden_states"]
        run.left = first(block.module(*args, **kwargs))
    return run


def _writer(run: _Written, kind: str) -> Any:
    def write(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        run.features[kind], run.written[kind] = args[0], output

    return write


def _reader(run: _Written, kind: str) -> Any:
    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        run.read.setdefault(kind, args[0])

    return read


MODE = {"stream": True}


def moments_of(cut: Replay, uncut: Replay, position: int, kind: str, weights: Sequence[Tensor] | None) -> Moments:
    """The moments of one part over all batches, the padding left out."""
    block = cut.blocks[position]
    output = next(part.output for part in block_parts(block) if part.kind == kind)
    constant = output.bias is not None
    moments = Moments.empty(output.in_features + constant, output.out_features)
    for index, batch in enumerate(cut.batches):
        inside = own_tokens(cut.anatomy, block, batch)
        ours, theirs = _run(cut, position, index), _run(uncut, position, index)
        shape = (*inside.shape, -1)
        features = ours.features[kind].reshape(shape)[inside].float()
        wanted = theirs.written[kind].reshape(shape)
        if MODE["stream"]:
            wanted = wanted + (theirs.stream(kind) - ours.stream(kind))
        if constant:
            features = torch.cat([features, torch.ones(len(features), 1)], dim=1)
        of_tokens = torch.ones(len(features)) if weights is None else weights[index][inside]
        moments.add(features, wanted[inside].float(), of_tokens)
    return moments


def solve(moments: Moments, output: Matrix, ridge: float) -> tuple[float, float]:
    """Refit one matrix (and its bias); the relative errors before and after."""
    bias = output.bias
    weight = output.weight if bias is None else torch.cat([output.weight, bias[:, None]], dim=1)
    found = refit(moments, weight, ridge)
    before, after = moments.error(weight), moments.error(found)
    output.weight.copy_(found[:, : output.in_features])
    if bias is not None:
        bias.copy_(found[:, -1])
    return before / moments.square, after / moments.square


def repair(network, uncut, batches, ridge=1e-3, weights: Mapping[str, Sequence[Tensor]] | None = None, progress=None):
    facts = {}
    with Replay(network, batches) as ours, Replay(uncut, batches) as theirs:
        for position, block in enumerate(ours.blocks):
            for part in block_parts(block):
                moments = moments_of(ours, theirs, position, part.kind, None if weights is None else weights[part.name])
                facts[part.name] = solve(moments, part.output, ridge)
            ours.advance(position)
            theirs.advance(position)
    return facts
