"""What each stage will take: operations, seconds, bytes. No torch."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.checking.fields import field_of, training_of
from moss_rlhf.checking.network import State
from moss_rlhf.checking.rows import trains_on_copies
from moss_rlhf.checking.shapes import state_after
from moss_rlhf.errors import MachineError
from moss_rlhf.model import memory
from moss_rlhf.model.config import group_names
from moss_rlhf.model.cost import all_block_parameters, macs_per_token, prefix_flops, training_bytes, training_flops
from moss_rlhf.model.processor import fast_bfloat16, processor_flags
from moss_rlhf.recipe import (
    CacheSpec,
    EnsembleSpec,
    FinetuneSpec,
    NarrowSpec,
    PretrainSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    SensitivitySpec,
    ShortenSpec,
    stage_kind,
    stage_spec,
)
from moss_rlhf.strategy import Run, cached_runs, frozen_blocks, lowest_trained

# of a plain float32 product's speed, what a stage reaches (docs/LOG.md)
_EFFICIENCY = 0.5
_EFFICIENCY_IN_BFLOAT16 = 1.0

_LIBRARY_BYTES = 1100 * 2**20  # torch, transformers, datasets, and what their allocators keep (measured)
_LOGIT_BYTES = 12  # of a token and word, in training: the logits, their log probabilities, the gradient
_BYTES_A_TOKEN = 4.5  # of English text, the space included
_REPLAYS = 2  # passes through each block: to measure what enters it, and to hand on what leaves it changed
_TRAINING_COST = 3  # a forward and a backward, in forwards


@dataclass(frozen=True)
class Forecast:
    """What one stage will leave and take."""

    kind: str
    parameters: int
    macs_per_token: float
    seconds: float
    memory_bytes: int
    flops: float


def foretell(
    recipe: Recipe, state: State, config: dict[str, Any], rows: dict[str, int], lengths: Sequence[int], longest: int
) -> list[Forecast]:
    length = float(np.mean(lengths))
    rate = _multiplication_rate()
    forecasts = []
    for stage in recipe.stages:
        spec = stage_spec(stage)
        copies = (
            recipe.data.augment.copies if recipe.data.augment and trains_on_copies(recipe.data.augment, spec) else 0
        )
        trained = rows | {"train": rows["train"] * (1 + copies)}
        if isinstance(spec, PretrainSpec):
            flops, peak = _reading(spec, state, rows, length)
        else:
            work = _ensemble_work if isinstance(spec, EnsembleSpec) else _work
            flops, peak = work(spec, state, trained, lengths, longest)
        state = state_after(spec, state, stage_kind(stage), config)
        macs = macs_per_token(state.dimensions, length)
        seconds = flops / (rate * _efficiency(spec))
        forecasts.append(Forecast(stage_kind(stage), state.parameters, macs, seconds, peak, flops))
    return forecasts


def _efficiency(spec: object) -> float:
    training = spec if isinstance(spec, PretrainSpec) else training_of(spec)
    fast = training is not None and training.precision != "float32" and fast_bfloat16(processor_flags())
    return _EFFICIENCY_IN_BFLOAT16 if fast else _EFFICIENCY


def _work(spec: object, state: State, rows: dict[str, int], lengths: Sequence[int], longest: int) -> tuple[float, int]:
    """Operations and peak bytes of one stage; `lengths` are tokens of a sample of the training rows."""
    length = float(np.mean(lengths))
    forward = 2 * macs_per_token(state.dimensions, length) * length
    if isinstance(spec, FinetuneSpec):
        evaluations = spec.epochs * spec.evaluations_per_epoch * rows["validation"] * forward
        passes = 2 if spec.loss and spec.loss.r_drop else 1
        training = passes * _learning(spec, state, rows["train"], length) + evaluations
        return training, _LIBRARY_BYTES + _learning_bytes(spec, state, rows["train"], longest)
    count = min(getattr(spec, "rows", 0), rows["train"])
    work = _passes(spec, len(state.shapes)) * count * forward
    return work, _measuring_bytes(spec, state.network, memory.Sample(count, length, float(np.max(lengths))))


def _passes(spec: object, layers: int) -> float:
    """How often a stage goes through its rows, in forwards."""
    if isinstance(spec, NarrowSpec):
        return _TRAINING_COST
    if isinstance(spec, ShortenSpec):
        return sum(layers - count for count in range(spec.remove)) if spec.score == "loss" else 1
    if isinstance(spec, SensitivitySpec):
        return _TRAINING_COST + _REPLAYS
    return _REPLAYS * _measurements(spec) if isinstance(spec, PruneSpec | QuantizeSpec) else 0


def _measuring_bytes(spec: object, network: memory.Network, sample: memory.Sample) -> int:
    """Peak bytes of a stage that trains nothing (benchmarks/forecast.py)."""
    base = memory.LIBRARY_BYTES + network.weights
    calibration = memory.calibration_bytes
    if isinstance(spec, NarrowSpec):
        gradient = memory.gradient_bytes(network, sample)
        repair = memory.repair_bytes(network, sample) if spec.repair else 0
        return base + max(gradient + (network.weights if spec.repair else 0), repair)
    if isinstance(spec, ShortenSpec):
        copies = 0 if spec.how == "drop" else network.weights
        return base + copies + memory.logits_bytes(network, sample) + memory.pass_bytes(network, sample)
    if isinstance(spec, SensitivitySpec):
        gradient = memory.gradient_bytes(network, sample, of_outputs=True)
        return base + max(gradient, calibration(network, sample, grams=True))
    solves = getattr(spec, "method", None) in ("sparsegpt", "gptq")
    measures = isinstance(spec, PruneSpec | QuantizeSpec) and _measurements(spec) > 0
    measured = calibration(network, sample, grams=solves, solves=solves) if measures else 0
    tables = memory.table_bytes(network) if isinstance(spec, QuantizeSpec) and spec.scheme != "int4" else 0
    return base + max(measured, tables)


def _ensemble_work(
    spec: EnsembleSpec, state: State, rows: dict[str, int], lengths: Sequence[int], longest: int
) -> tuple[float, int]:
    """The members' trainings, their answers to train and validation, and the training of the one that learns them."""
    held, length = rows["train"] // spec.members, float(np.mean(lengths))
    seen = {"train": rows["train"] - held, "validation": held} if spec.by == "folds" else rows
    member, _ = _work(spec.finetune, state, seen, lengths, longest)
    one, peak = _work(spec.finetune, state, rows, lengths, longest)
    answers = 2 * macs_per_token(state.dimensions, length) * length * (rows["train"] + rows["validation"])
    return spec.members * (member + answers) + one, peak + 4 * spec.members * state.parameters


def _learning(spec: FinetuneSpec, state: State, rows: int, length: float) -> float:
    """Operations of the training steps: frozen blocks have no backward, cached ones a single forward."""
    steps, tokens, cost = -(-rows // spec.batch_size), rows * length, state.dimensions
    frozen = frozen_by_step(spec, group_names(state.shapes), steps)
    total = sum(
        training_flops(cost, length, count / steps * tokens, blocks)
        for blocks, count in sorted(Counter(frozen).items())
    )
    saved = sum(
        prefix_flops(cost, length, (run.steps / steps - 1) * tokens, run.blocks) for run in _cached(spec, frozen, steps)
    )
    return total - saved


def _learning_bytes(spec: FinetuneSpec, state: State, rows: int, longest: int) -> int:
    """Peak bytes of training: what never trains has no gradient, no moments, and keeps nothing for the backward."""
    blocks = min(frozen_by_step(spec, group_names(state.shapes), -(-rows // spec.batch_size)))
    batch, hidden = spec.batch_size * longest, state.dimensions.hidden
    batch *= 2 if spec.loss and spec.loss.r_drop else 1
    moving = state.parameters
    if blocks:
        above = sum(all_block_parameters(shape, state.dimensions) for shape in state.shapes[blocks:])
        moving = above + state.dimensions.head_parameters
    logits = _LOGIT_BYTES * batch * state.network.vocabulary
    return logits + training_bytes(moving, hidden, len(state.shapes) - blocks, batch) + 4 * (state.parameters - moving)


def frozen_by_step(spec: FinetuneSpec, groups: Sequence[str], steps_per_epoch: int) -> list[int]:
    """How many of the lowest blocks are frozen at each step; where they thaw by damage, the least that may be."""
    if spec.phases is None:
        total = spec.epochs * steps_per_epoch
        lowest = [lowest_trained(step, total, len(groups), spec.unfreeze) for step in range(total)]
        if spec.layers == "by_damage":
            return [len(groups) - 2 if each == len(groups) - 1 else 0 for each in lowest]
        return [max(0, each - 1) for each in lowest]
    found: list[int] = []
    for phase in spec.phases:
        trains = [phase.train == "all" or name in phase.train for name in groups]
        found += [frozen_blocks(trains)] * (phase.epochs * steps_per_epoch)
    return found


def _cached(spec: FinetuneSpec, frozen: Sequence[int], steps_per_epoch: int) -> list[Run]:
    options = _cache_options(spec)
    return cached_runs(frozen, steps_per_epoch, options.epochs) if options else []


def _cache_options(spec: FinetuneSpec) -> CacheSpec | None:
    if isinstance(spec.cache, CacheSpec):
        return spec.cache
    return None if spec.cache == "off" else CacheSpec(required=spec.cache == "required")


def cache_notes(recipe: Recipe, state: State, config: dict[str, Any], rows: int, length: float) -> Iterator[str]:
    """Where frozen blocks will run at every step for want of space; MachineError where a cache is required."""
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        training = training_of(spec)
        if training and (options := _cache_options(training)):
            reason = _no_cache(training, options, state, rows, length, Path(recipe.output))
            if reason and options.required:
                raise MachineError(f"{field_of(index, stage)}.cache: required, but {reason}. Give cache: auto.")
            if reason and _frozen_epochs(training, state, rows):
                yield f"{field_of(index, stage)}: frozen blocks will run at every step: {reason}"
        state = state_after(spec, state, stage_kind(stage), config)


def _frozen_epochs(spec: FinetuneSpec, state: State, rows: int) -> list[Run]:
    steps = -(-rows // spec.batch_size)
    return _cached(spec, frozen_by_step(spec, group_names(state.shapes), steps), steps)


def _no_cache(
    spec: FinetuneSpec, options: CacheSpec, state: State, rows: int, length: float, output: Path
) -> str | None:
    """Why the outputs of frozen blocks can't be kept, as far as can be foretold."""
    if not _frozen_epochs(spec, state, rows):
        return f"no block stays frozen for {options.epochs:g} epochs"
    halved = options.dtype in ("bfloat16", "float16") or (options.dtype == "auto" and spec.precision == "bfloat16")
    size = rows * length * state.dimensions.hidden * (2 if halved else 4)
    existing = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > min(options.bytes, free):
        return f"their outputs take about {size / 1e6:,.1f} MB; {min(options.bytes, free) / 1e6:,.1f} MB may be used"
    return None


def _measurements(spec: PruneSpec | QuantizeSpec) -> int:
    """How often the network is gone through, block by block."""
    if isinstance(spec, PruneSpec):
        return int(spec.method != "magnitude" or spec.allocation != "uniform")
    scaling = spec.smooth > 0 or spec.method == "awq"
    return int(scaling) + int(spec.method == "gptq" or spec.scheme == "int8_static")


def _reading(spec: PretrainSpec, state: State, rows: dict[str, int], length: float) -> tuple[float, int]:
    """Operations and peak bytes of pretraining, the language model's head left out."""
    tokens = spec.epochs * _text_tokens(spec, rows["train"] * length)
    batch = spec.batch_size * spec.max_length
    peak = training_bytes(state.parameters, state.dimensions.hidden, len(state.shapes), batch)
    return training_flops(state.dimensions, spec.max_length, tokens), _LIBRARY_BYTES + peak


def _text_tokens(spec: PretrainSpec, of_task: float) -> float:
    """Tokens of an epoch; of a file about one in four bytes, in what it says of its size."""
    return of_task if spec.texts == "task" else Path(spec.texts).stat().st_size / _BYTES_A_TOKEN


def _multiplication_rate() -> float:
    """Operations a second of a float32 matrix product, measured now: the best of many, for other work disturbs them."""
    size = 512
    matrix = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        np.dot(matrix, matrix)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
