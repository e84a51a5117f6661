"""Run a network block by block, with exactly the outputs of the whole: calibration, cached prefixes, models too large.

The network itself does everything outside its blocks. To find what enters block k, its forward runs with the blocks
before k standing in: each answers with the stored output of the block that ran last, and block k stops the run and
hands out its arguments. Nothing between the blocks needs to be known here (masks by layer, T5's position biases,
DeBERTa's convolution after block 0, the encoder's last norm): the network computes it, from true outputs. That costs
the embeddings once a block and batch, which is little beside a block.

    for visit in calibrate(model, batches, gather="grams"):
        …change visit.block by visit.statistics…        the changed block's outputs enter the next one
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Anatomy, Attention, Block, Matrix, anatomy_of
from moss_rlhf.progress import Progress

Gather = Literal["nothing", "norms", "grams"]
Batch = tuple[Mapping[str, Tensor], Tensor]  # (inputs of the network, labels)
Args = tuple[Any, ...]  # of a block
Kwargs = dict[str, Any]

CACHE_BYTES = 2**30
"""Activations kept in memory; what exceeds it lies on disk."""


@dataclass
class InputStatistics:
    """What entered one matrix over all calibration tokens; padding is left out.

    tokens             how many.
    squared_norm       (in,) Σ x², float64.
    absolute_maximum   (in,) float32.
    absolute_sum       (in,) Σ |x|, float64.
    least, most        of all features.
    gram               (in, in) Σ x xᵀ, float32; None where only norms were asked for.

    They lie where the tokens lay: on the processor, or on the GPU that the network is on.
    """

    features: int
    keeps_gram: bool = False
    tokens: int = 0
    squared_norm: Tensor = field(init=False)
    absolute_maximum: Tensor = field(init=False)
    absolute_sum: Tensor = field(init=False)
    least: float = field(init=False, default=math.inf)
    most: float = field(init=False, default=-math.inf)
    gram: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.squared_norm = torch.zeros(self.features, dtype=torch.float64)
        self.absolute_sum = torch.zeros(self.features, dtype=torch.float64)
        self.absolute_maximum = torch.zeros(self.features)
        if self.keeps_gram:
            self.gram = torch.zeros(self.features, self.features)

    def add(self, rows: Tensor) -> None:
        """Count the tokens of `rows`, (tokens, in)."""
        values = rows.detach().float()
        magnitudes = values.abs()
        self._move(values.device)
        self.tokens += len(values)
        self.squared_norm += values.square().sum(dim=0, dtype=torch.float64)
        self.absolute_sum += magnitudes.sum(dim=0, dtype=torch.float64)
        if len(values):
            self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))
            self.absolute_maximum = torch.maximum(self.absolute_maximum, magnitudes.amax(dim=0))
        if self.gram is not None:
            self.gram.addmm_(values.T, values)

    def _move(self, device: torch.device) -> None:
        self.squared_norm, self.absolute_sum = self.squared_norm.to(device), self.absolute_sum.to(device)
        self.absolute_maximum = self.absolute_maximum.to(device)
        self.gram = None if self.gram is None else self.gram.to(device)

    @property
    def norm(self) -> Tensor:
        """(in,) L2 norm of each feature over the tokens, float32."""
        return self.squared_norm.sqrt().float()

    @property
    def finite(self) -> bool:
        return bool(self.squared_norm.isfinite().all())


@dataclass(frozen=True)
class Visit:
    """One block, ready to be changed, and what entered its matrices, by their names."""

    block: Block
    statistics: dict[str, InputStatistics]


def calibrate(
    model: Any,
    batches: Sequence[Batch],
    *,
    gather: Gather = "grams",
    progress: Progress | None = None,
    cache_bytes: int = CACHE_BYTES,
    title: str = "calibrating",
) -> Iterator[Visit]:
    """Visit the blocks in order, each after those before it were changed; the caller changes it in the loop's body.

    model         with `.network`; where it has `.weights`, each block's are loaded for its visit and written back.
    batches       (inputs, labels), padded on the right.
    cache_bytes   of activations kept in memory; beyond it they lie in a temporary folder.
    raises        ModelError where an activation is not finite, naming the matrix.

    A block that serves several layers (ALBERT's) is visited once, with the statistics of all of them. They are the
    visit's: once the loop goes on they are gone.
    """
    progress = progress or Progress(quiet=True)
    replay = Replay(model.network, batches, cache_bytes, getattr(model, "weights", None))
    with replay, progress.bar(title, len(replay.blocks)) as bar:
        for position, block in enumerate(replay.blocks):
            with replay.loaded(block):
                statistics = replay.gather(position, gather)
                if position == replay.last_use(block):
                    yield Visit(block, statistics)
                    statistics.clear()  # the caller still holds them, and they may be larger than the block
                replay.advance(position)
            bar.advance()


def visit_blocks(model: Any) -> Iterator[Block]:
    """The blocks in order, each in memory while it is visited; without running the network."""
    for block in model.anatomy.blocks:
        if model.weights is None:
            yield block
        else:
            with model.weights.loaded(block):
                yield block


class Replay:
    """The states of a network between two of its blocks, for fixed batches."""

    def __init__(
        self, network: Any, batches: Sequence[Batch], cache_bytes: int = CACHE_BYTES, weights: Any = None
    ) -> None:
        self.network, self.batches, self.weights = network, batches, weights
        self.anatomy: Anatomy = anatomy_of(network)
        self.blocks: tuple[Block, ...] = self.anatomy.blocks * self.anatomy.repeats
        self.states = {stack.name: _States(len(batches), cache_bytes) for stack in self.anatomy.family.stacks}
        self._shared: dict[str, dict[str, InputStatistics]] = {}
        self._open = ExitStack()

    def __enter__(self) -> Replay:
        self.network.eval()
        self._open.enter_context(torch.no_grad())
        self._open.enter_context(without_cache(self.network))
        for states in self.states.values():
            self._open.enter_context(states)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def last_use(self, block: Block) -> int:
        return max(position for position, other in enumerate(self.blocks) if other is block)

    @contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        if self.weights is None:
            yield
            return
        with self.weights.loaded(block):
            yield

    def inputs(self, position: int, batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with which the network calls its `position`-th block on a batch."""
        try:
            self._forward(position, batch)
        except _Reached as reached:
            return reached.args_of_block, reached.kwargs_of_block
        raise ModelError(f"the network never called block {position}: its blocks are not gone through in order.")

    def output(self, batch: int) -> Any:
        """What the network returns on a batch once all blocks have run."""
        return self._forward(len(self.blocks), batch)

    def _forward(self, done: int, batch: int) -> Any:
        answers: dict[str, Any] = {str(name): states[batch] for name, states in self.states.items()}
        inputs, _ = self.batches[batch]
        with _answering(self.anatomy.blocks, done, answers):
            return self.network(**inputs)

    def gather(self, position: int, gather: Gather) -> dict[str, InputStatistics]:
        """Run a block on every batch and count what enters its matrices; of all uses so far where it is shared."""
        block = self.blocks[position]
        if gather == "nothing":
            return {}
        statistics = self._shared.setdefault(block.name, _empty_statistics(block, gather == "grams"))
        for index in range(len(self.batches)):
            args, kwargs = self.inputs(position, index)
            with _counting(block, statistics, *self._insides(block, index)):
                block.module(*args, **kwargs)
        _refuse_infinite(block, statistics)
        return self._shared.pop(block.name) if position == self.last_use(block) else statistics

    def _insides(self, block: Block, batch: int) -> tuple[Tensor, Tensor]:
        """(of the block's own tokens, of the encoder's) bool, (rows, length): True inside a text."""
        inputs, labels = self.batches[batch]
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        two_stacks = len(self.anatomy.family.stacks) > 1
        return (labels != _IGNORED if two_stacks and block.stack == "decoder" else mask), mask

    def influence(self, position: int) -> float:
        """Mean over tokens of 1 − cos(input, output) of a block (Men et al. 2024, arXiv:2403.03853, eq. 1)."""
        block, total, tokens = self.blocks[position], 0.0, 0
        for index in range(len(self.batches)):
            args, kwargs = self.inputs(position, index)
            inside, _ = self._insides(block, index)
            before, after = args[0] if args else kwargs["hidden_states"], first(block.module(*args, **kwargs))
            turned = 1 - torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
            total += float(turned[inside].sum())
            tokens += int(inside.sum())
        return total / max(tokens, 1)

    def advance(self, position: int) -> None:
        """Run a block on every batch and keep its outputs in the place of the one before."""
        block = self.blocks[position]
        for index in range(len(self.batches)):
            args, kwargs = self.inputs(position, index)
            self.states[block.stack][index] = block.module(*args, **kwargs)


def first(output: Any) -> Tensor:
    """The hidden states among what a block returns."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


_IGNORED = -100  # labels of padding


class _Reached(Exception):  # noqa: N818  # no error
    """A block was about to run."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__("a block was reached")
        self.args_of_block, self.kwargs_of_block = args, kwargs


Forward = Callable[..., Any]


@contextmanager
def standing_in(blocks: Sequence[Block], answer: Callable[[Block, Forward, Args, Kwargs], Any]) -> Iterator[None]:
    """While it holds, each call of one of `blocks` gets what `answer(block, its own forward, args, kwargs)` returns."""
    before = [block.module.__dict__.get("forward") for block in blocks]

    def stand_in(block: Block) -> Forward:
        own = block.module.forward
        return lambda *args, **kwargs: answer(block, own, args, kwargs)

    for block in blocks:
        block.module.forward = stand_in(block)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            del block.module.__dict__["forward"]
            if forward is not None:
                block.module.forward = forward


@contextmanager
def _answering(blocks: Sequence[Block], done: int, answers: Mapping[str, Any]) -> Iterator[None]:
    """The first `done` calls of blocks answer for them; the next one raises _Reached."""
    calls = 0

    def answer(block: Block, _: Forward, args: Args, kwargs: Kwargs) -> Any:
        nonlocal calls
        calls += 1
        if calls > done:
            raise _Reached(args, kwargs)
        return answers[block.stack]

    with standing_in(blocks, answer):
        yield


@contextmanager
def without_cache(network: Any) -> Iterator[None]:
    """Generation's cache of keys and values costs memory, hides from transformers that rows are packed, and would be
    read by a block that runs twice.
    """
    used = getattr(network.config, "use_cache", None)
    if used is None:
        yield
        return
    network.config.use_cache = False
    try:
        yield
    finally:
        network.config.use_cache = used


class _States:
    """One output of a block a batch, a tensor or a tuple; in memory up to a bound, beyond it on disk."""

    def __init__(self, batches: int, cache_bytes: int) -> None:
        self._kept: list[Any] = [None] * batches
        self._bytes = [0] * batches
        self._limit = cache_bytes
        self._device = torch.device("cpu")

    def __enter__(self) -> _States:
        self._folder = tempfile.TemporaryDirectory(prefix="moss-states-")
        return self

    def __exit__(self, *_: object) -> None:
        self._kept = []
        self._folder.cleanup()

    def __getitem__(self, batch: int) -> Any:
        kept = self._kept[batch]
        return _read_state(kept, self._device) if isinstance(kept, Path) else kept

    def __setitem__(self, batch: int, output: Any) -> None:
        size, self._device = _bytes_of(output), first(output).device
        self._bytes[batch] = 0
        if sum(self._bytes) + size > self._limit:
            file = Path(self._folder.name) / f"{batch}.safetensors"
            _write_state(output, file)
            self._kept[batch] = file
        else:
            self._kept[batch], self._bytes[batch] = output, size


def _bytes_of(output: Any) -> int:
    parts = output if isinstance(output, tuple) else (output,)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def _write_state(output: Any, file: Path) -> None:
    parts = output if isinstance(output, tuple) else (output,)
    tensors = {str(index): part.contiguous().clone() for index, part in enumerate(parts) if part is not None}
    partial = file.with_suffix(".partial")  # a state that is read may be the one that is replaced
    save_file(tensors, partial, metadata={"parts": str(len(parts)), "tuple": str(isinstance(output, tuple))})
    partial.replace(file)


def _read_state(file: Path, device: torch.device) -> Any:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = {name: tensor.to(device, copy=True) for name, tensor in load_file(file).items()}  # aligned as torch would
    parts = tuple(tensors.get(str(index)) for index in range(int(metadata["parts"])))
    return parts if metadata["tuple"] == "True" else parts[0]


def _sources(block: Block) -> Iterator[tuple[tuple[Matrix, ...], Literal["own", "encoder", "any"]]]:
    """The matrices that read the same input, and whose tokens it holds."""
    for attention in block.attentions:
        yield from _attention_sources(attention, crossing=attention is block.cross_attention)
    yield block.feed_forward.ups, "own"
    yield (block.feed_forward.down,), "own"


def _attention_sources(
    attention: Attention, crossing: bool
) -> Iterator[tuple[tuple[Matrix, ...], Literal["own", "encoder", "any"]]]:
    named = len(attention.row.producers)
    if crossing:
        yield attention.producers[:1], "own"
        yield attention.producers[1:named], "encoder"
    else:
        yield attention.producers[:named], "own"
    for matrix in attention.producers[named:]:  # DeBERTa's: of positions, not of tokens
        yield (matrix,), "any"
    yield (attention.output,), "own"


def _empty_statistics(block: Block, grams: bool) -> dict[str, InputStatistics]:
    statistics: dict[str, InputStatistics] = {}
    for matrices, _ in _sources(block):
        shared = InputStatistics(matrices[0].in_features, grams)
        statistics |= {matrix.name: shared for matrix in matrices}
    return statistics


@contextmanager
def _counting(
    block: Block, statistics: Mapping[str, InputStatistics], own: Tensor, of_encoder: Tensor
) -> Iterator[None]:
    """Count what enters the matrices of a block while it runs."""
    hooks = []
    for matrices, tokens in _sources(block):
        inside = {"own": own, "encoder": of_encoder, "any": None}[tokens]
        hook = _counter(statistics[matrices[0].name], inside)
        hooks.append(matrices[0].module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _counter(statistics: InputStatistics, inside: Tensor | None) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        values = args[0]
        if inside is None:
            statistics.add(values.flatten(0, -2))
        elif values.numel() == inside.numel() * values.shape[-1]:  # else positions, which DeBERTa sends the same way
            statistics.add(values.reshape(*inside.shape, -1)[inside])

    return count


def _refuse_infinite(block: Block, statistics: Mapping[str, InputStatistics]) -> None:
    for name, found in statistics.items():
        if not found.finite:
            raise ModelError(
                f"calibration: what enters {name} ({block.name}) is not finite: the checkpoint holds inf or nan, or "
                "overflows. Fine-tune again with a lower learning rate, or fetch the checkpoint again."
            )
        if found.tokens and not math.isfinite(float(found.absolute_maximum.max())):
            raise ModelError(f"calibration: what enters {name} ({block.name}) is not finite.")
