"""Refit what a cut left, without training: each part's output matrix by least squares on calibration texts.

When units of a part went, the columns that stay of its output matrix W can make up for some of what they wrote.
Block by block, with x (features) what enters W in the cut network, whose earlier parts are repaired already, and t
what W has to write so that the stream (the hidden states that the part adds to) is the uncut network's,

    min over W, b   Σ_tokens ‖W x + b − t‖²  +  λ ‖W − W_cut‖²  +  λ ‖b − b_cut‖²

The masks' tuning of Kwon et al. 2022 (arXiv:2204.09656, §4.3) is the special case of one scale a unit; the asymmetry
(inputs of the cut network against the stream of the uncut one) is that of Nagel et al. 2020 (arXiv:2004.10568, §4.3)
and keeps errors from piling up. Solved with torch.linalg from Gram matrices, so memory does not grow with the texts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.model.anatomy import Matrix, anatomy_of
from moss_rlhf.model.replay import Batch, Replay, first
from moss_rlhf.optimization.block_states import own_tokens
from moss_rlhf.optimization.unit_scores import Part, block_parts, parts_of
from moss_rlhf.progress import Progress

RIDGE = 1e-3


@dataclass
class Moments:
    """Second moments, summed over tokens, of features x, (f,), and of what is missing, r = t − W x − b, (out,).

    gram (f, f) Σ x xᵀ;  cross (f, out) Σ x rᵀ;  missing Σ ‖r‖²;  scale Σ ‖t‖²
    """

    gram: Tensor
    cross: Tensor
    missing: float = 0.0
    scale: float = 0.0

    @classmethod
    def empty(cls, features: int, outputs: int) -> Moments:
        return cls(torch.zeros(features, features), torch.zeros(features, outputs))

    def add(self, features: Tensor, missing: Tensor, targets: Tensor) -> None:
        """Count tokens: features (tokens, f), missing and targets (tokens, out)."""
        self.gram += (features.T @ features).cpu()
        self.cross += (features.T @ missing).cpu()
        self.missing += float(missing.double().square().sum())
        self.scale += float(targets.double().square().sum())

    def __iadd__(self, other: Moments) -> Moments:
        self.gram += other.gram
        self.cross += other.cross
        self.missing += other.missing
        self.scale += other.scale
        return self

    def error(self, change: Tensor) -> float:
        """Σ ‖r − D x‖² once the weight is changed by D, (out, f)."""
        by = change.double()
        inside = (by @ self.gram.double() * by).sum() - 2 * (by.T * self.cross.double()).sum()
        return max(0.0, float(inside) + self.missing)


def refit(moments: Moments, ridge: float = RIDGE) -> Tensor:
    """The change of the weight, (out, f), that solves the ridge least squares above; float64.

    ridge    λ as a share of the mean squared feature, above 0: it holds the solution where texts are few.
    raises   ValueError on a ridge that is not above 0.
    """
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}: fewer tokens than features would leave no solution")
    gram = moments.gram.double()
    damping = ridge * gram.diagonal().mean() + torch.finfo(torch.float64).tiny  # features may all be 0
    damped = gram + damping * torch.eye(len(gram), dtype=torch.float64)
    change: Tensor = torch.linalg.solve(damped, moments.cross.double()).T
    return change


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
        stream = self.entered
        for before in list(self.written)[: list(self.written).index(kind)]:
            stream = stream + self.written[before].reshape(shape)
        return stream


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


def moments_of(cut: Replay, uncut: Replay, position: int, kind: str) -> Moments:
    """The moments of one part of the block at `position` over all batches, the padding left out.

    Where its output matrix has a bias, the last feature is the constant 1.
    """
    block = cut.blocks[position]
    output = next(part.output for part in block_parts(block) if part.kind == kind)
    moments = Moments.empty(output.in_features + (output.bias is not None), output.out_features)
    for index, batch in enumerate(cut.batches):
        inside = own_tokens(cut.anatomy, block, batch)
        ours, theirs = _run(cut, position, index), _run(uncut, position, index)
        shape = (*inside.shape, -1)
        wanted = theirs.written[kind].reshape(shape) + theirs.stream(kind) - ours.stream(kind)
        missing = wanted - ours.written[kind].reshape(shape)
        features = ours.features[kind].reshape(shape)[inside].float()
        if output.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        moments.add(features, missing[inside].float(), wanted[inside].float())
    return moments


def refit_matrix(output: Matrix, moments: Moments, ridge: float) -> tuple[float, float]:
    """Refit a matrix and its bias in place; its relative squared errors before and after."""
    change, scale = refit(moments, ridge), max(moments.scale, 1e-300)
    output.weight.add_(change[:, : output.in_features].to(output.weight))
    if output.bias is not None:
        output.bias.add_(change[:, -1].to(output.bias))
    return moments.missing / scale, moments.error(change) / scale


def repair_outputs(
    network: Any,
    uncut: Any,
    batches: Sequence[Batch],
    *,
    ridge: float = RIDGE,
    frozen: Collection[int] = (),
    progress: Progress | None = None,
) -> dict[str, tuple[float, float]]:
    """Refit the output matrices of a cut network, in place, part by part from the lowest.

    uncut     the network before the cut: as many blocks, the same hidden size.
    frozen    ids of parameters that stay as they are: those whose zeros must survive.
    returns   relative squared errors (before, after) by the parts' names, Σ‖W x + b − t‖² / Σ‖t‖².
    """
    progress = progress or Progress(quiet=True)
    repair = _repair_shared if anatomy_of(network).family.shared else _repair_blocks
    with progress.bar("repairing", len(parts_of(anatomy_of(network)))) as bar:
        errors = {}
        for part, moments in repair(network, uncut, batches):
            if id(part.output.parameter) not in frozen:
                errors[part.name] = refit_matrix(part.output, moments, ridge)
            bar.advance()
    return errors


def _repair_blocks(network: Any, uncut: Any, batches: Sequence[Batch]) -> Iterator[tuple[Part, Moments]]:
    """Each part with its moments, after the caller has refitted the parts before it."""
    with Replay(network, batches) as ours, Replay(uncut, batches) as theirs:
        for position, block in enumerate(ours.blocks):
            for part in block_parts(block):
                yield part, moments_of(ours, theirs, position, part.kind)
            ours.advance(position)
            theirs.advance(position)


def _repair_shared(network: Any, uncut: Any, batches: Sequence[Batch]) -> Iterator[tuple[Part, Moments]]:
    """The same where one block serves all layers: its moments are those of all of its uses."""
    for part in parts_of(anatomy_of(network)):
        total = Moments.empty(part.output.in_features + (part.output.bias is not None), part.output.out_features)
        with Replay(network, batches) as ours, Replay(uncut, batches) as theirs:
            for position in range(len(ours.blocks)):
                total += moments_of(ours, theirs, position, part.kind)
                ours.advance(position)
                theirs.advance(position)
        yield part, total
