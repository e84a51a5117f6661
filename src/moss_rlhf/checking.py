"""Everything that can be found wrong, or foretold, before any work: reads files, imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.data import DataCheck, check_data
from moss_rlhf.errors import DataError, MachineError, ModelError, RecipeError, nearest
from moss_rlhf.model.anatomy import FAMILIES, BlockShape, family_of
from moss_rlhf.model.config import (
    KEY,
    block_shapes,
    group_names,
    head_size,
    hidden_size,
    is_gated,
    position_limit,
    queries_per_key,
    read_config,
    trained_labels,
)
from moss_rlhf.model.cost import (
    Dimensions,
    all_block_parameters,
    macs_per_token,
    prefix_flops,
    training_bytes,
    training_flops,
    units_kept,
)
from moss_rlhf.model.locate import locate, read_header, weight_files
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    CacheSpec,
    EnsembleSpec,
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    SensitivitySpec,
    ShortenSpec,
    stage_kind,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.rundir import refuse_foreign
from moss_rlhf.strategy import Run, cached_runs, frozen_blocks, lowest_trained
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.lengths import choose_max_length, length_facts

_EFFICIENCY = 0.5  # of a plain matrix product's speed, reached in training (docs/LOG.md)
_LIBRARY_BYTES = 1100 * 2**20  # torch, transformers, datasets, and what their allocators keep (measured)
_CHECKPOINT_BYTES = 28  # a parameter's share of two resume states (weights and two moments) and the best weights
_EVERY_TOKEN = ("embeddings_project.weight", "embedding_hidden_mapping_in.weight", "encoder.conv.conv.weight")
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


@dataclass(frozen=True)
class Check:
    """What was found; `tokens` are the length facts of each split."""

    data: DataCheck
    tokens: dict[str, dict[str, float]]
    parameters: int
    stages: tuple[Forecast, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _State:
    """The network as a stage finds it."""

    dimensions: Dimensions
    parameters: int

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return self.dimensions.blocks

    def with_shapes(self, shapes: Sequence[BlockShape]) -> _State:
        def count(blocks: Sequence[BlockShape]) -> int:
            return sum(all_block_parameters(shape, self.dimensions) for shape in blocks)

        parameters = self.parameters - count(self.shapes) + count(shapes)
        return _State(dataclasses.replace(self.dimensions, blocks=tuple(shapes)), parameters)


def check(recipe: Recipe, progress: Progress | None = None) -> Check:
    """Validate everything that a run would stumble over, and foretell its stages.

    raises   UserError: the first fault found, in the order model, stages, output, data.
    """
    place = locate(recipe.model)
    config = read_config(place)
    check_stages(recipe, place)
    check_output(recipe, place)
    task = TASKS[recipe.task]
    known = trained_labels(config)
    data = check_data(
        recipe.data, task.columns, seed=recipe.seed, known_labels=known, progress=progress or Progress(quiet=True)
    )
    check_labels(recipe, config, data.labels)
    check_folds(recipe, data.facts["train"]["classes"])
    lengths = {split: _token_lengths(place, texts) for split, texts in data.samples.items()}
    limit = position_limit(config, float("inf"))
    longest = choose_max_length(recipe.data.max_length, lengths["train"], limit)
    tokens = {split: length_facts(values, longest) for split, values in lengths.items()}
    state = _initial_state(place, config, len(data.labels))
    rows = {split: facts["rows"] for split, facts in data.facts.items()}
    stages = tuple(_forecasts(recipe, state, config, rows, tokens["train"]["mean"], longest))
    notes = tuple(_cache_notes(recipe, state, config, rows["train"], tokens["train"]["mean"]))
    return Check(data, tokens, state.parameters, stages, (*data.notes, *notes))


def check_stages(recipe: Recipe, place: Path) -> None:
    """Whether the model can go through the stages: something to remove, something left, a teacher that is one."""
    config = read_config(place)
    if family_of(config["model_type"]).kind != "encoder":
        encoders = ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind == "encoder"))
        raise ModelError(
            f"model: {recipe.model} is a {config['model_type']}; recipes classify texts with encoders ({encoders}). "
            "From Python every method works on it: see docs/decoders.md."
        )
    _check_search(recipe)
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    shapes = block_shapes(config)
    quantized = config.get(KEY, {}).get("quantization")
    for index, stage in enumerate(recipe.stages):
        field, spec = f"stages.{index}.{stage_kind(stage)}", stage_spec(stage)
        if quantized:
            raise ModelError(f"{field}: {place} is quantized already; give the checkpoint from before quantization.")
        shapes = _shapes_after(spec, shapes, field, config)
        if isinstance(spec, QuantizeSpec) and spec.scheme == "int4" and "onnx" in recipe.export:
            raise RecipeError(f"{field}.scheme: int4 can't be exported to ONNX. Give int8, or leave export out.")
        if isinstance(spec, ShortenSpec) and family_of(config["model_type"]).shared:
            raise RecipeError(f"{field}: the layers of a {config['model_type']} share one block.")
        if training := _training(spec):
            inside = _field(index, stage)
            _check_metric(training.metric, recipe.task, f"{inside}.metric")
            _check_layers(training, shapes, config, inside)
            if training.layers == "by_damage":
                _check_damage(recipe, index, place, inside)
        if isinstance(spec, FinetuneSpec) and spec.distill:
            _check_teacher(recipe, index, spec.distill.teacher, config, f"{field}.distill.teacher")


def _training(spec: object) -> FinetuneSpec | None:
    """How a stage trains, if it does: an ensemble's members train alike."""
    if isinstance(spec, EnsembleSpec):
        return spec.finetune
    return spec if isinstance(spec, FinetuneSpec) else None


def _check_layers(spec: FinetuneSpec, shapes: Sequence[BlockShape], config: dict[str, Any], field: str) -> None:
    """Phases name groups that are there, and there are blocks to draw anew."""
    groups = group_names(shapes)
    for position, phase in enumerate(spec.phases or ()):
        for name in () if phase.train == "all" else phase.train:
            if name not in groups:
                raise RecipeError(
                    f"{field}.phases.{position}.train: there is no group {name!r}. The groups are {', '.join(groups)}."
                )
    if spec.reinitialise and family_of(config["model_type"]).shared:
        raise RecipeError(f"{field}.reinitialise: the layers of a {config['model_type']} share one block.")
    if spec.reinitialise > len(shapes):
        raise RecipeError(
            f"{field}.reinitialise: {spec.reinitialise} of {len(shapes)} blocks. Give at most {len(shapes)}."
        )


def _check_damage(recipe: Recipe, index: int, place: Path, field: str) -> None:
    """Somebody measured the sensitivity of the blocks that this stage finds."""
    before = [stage_spec(stage) for stage in recipe.stages[:index]]
    measured = [position for position, spec in enumerate(before) if isinstance(spec, SensitivitySpec)]
    if not measured and not (place / "sensitivity.json").exists():
        raise RecipeError(
            f"{field}.layers: by_damage reads what sensitivity measured, and no stage before this one measures it. Put "
            "`- sensitivity` before it, or leave layers out."
        )
    if any(isinstance(spec, ShortenSpec) for spec in before[measured[-1] if measured else 0 :]):
        raise RecipeError(
            f"{field}.layers: by_damage, but sensitivity was measured before a shorten stage removed blocks. Put "
            "`- sensitivity` after it."
        )


def _shapes_after(
    spec: object, shapes: tuple[BlockShape, ...], field: str, config: dict[str, Any]
) -> tuple[BlockShape, ...]:
    if isinstance(spec, NarrowSpec):
        return _narrowed(spec, shapes, field)
    if isinstance(spec, ShortenSpec):
        if spec.remove >= len(shapes):
            raise RecipeError(
                f"{field}.remove: {spec.remove} of {len(shapes)} layers would leave none. Give 1 to {len(shapes) - 1}."
            )
        return shapes[: len(shapes) - spec.remove]
    if isinstance(spec, QuantizeSpec) and spec.scheme == "int4":
        _check_groups(spec, shapes, config, field)
    return shapes


def _check_groups(spec: QuantizeSpec, shapes: tuple[BlockShape, ...], config: dict[str, Any], field: str) -> None:
    """Groups must fill the rows of every matrix."""
    widths = {hidden_size(config)} | {
        width for shape in shapes for width in (shape.heads * head_size(config), shape.feed_forward)
    }
    for width in sorted(widths):
        if width % spec.group_size:
            raise RecipeError(
                f"{field}.group_size: {spec.group_size} does not divide rows of {width} weights. Give a divisor of "
                f"{', '.join(map(str, sorted(widths)))}."
            )


def _narrowed(spec: NarrowSpec, shapes: tuple[BlockShape, ...], field: str) -> tuple[BlockShape, ...]:
    budget = max(spec.macs, spec.parameters, spec.latency)  # spent where it costs least: foretold as if evenly
    heads, neurons = (budget, budget) if budget else (spec.heads, spec.feed_forward)
    narrowed = tuple(
        BlockShape(units_kept(shape.heads, heads), units_kept(shape.feed_forward, neurons, spec.multiple_of))
        for shape in shapes
    )
    if narrowed == shapes and not spec.hidden:
        raise RecipeError(
            f"{field}: heads {spec.heads} and feed_forward {spec.feed_forward} remove less than one unit of "
            f"{shapes[0].heads} heads and {shapes[0].feed_forward} neurons. Give larger shares."
        )
    return narrowed


def _check_search(recipe: Recipe) -> None:
    known = TASKS[recipe.task].metrics
    if recipe.search and recipe.search.metric is not None and recipe.search.metric not in known:
        raise RecipeError(
            f"search.metric: {recipe.task} has no metric {recipe.search.metric!r}; "
            f"{nearest(recipe.search.metric, known)}"
        )
    if recipe.search and importlib.util.find_spec("optuna") is None:
        raise MachineError("search: optuna is not installed. Run: pip install 'moss-rlhf[search]'")


def _check_metric(name: str | None, task: str, field: str) -> None:
    known = ["loss", *TASKS[task].metrics]
    if name is not None and name not in known:
        raise RecipeError(f"{field}: {task} has no metric {name!r}; {nearest(name, known)}")


def _check_teacher(recipe: Recipe, index: int, teacher: str, config: dict[str, Any], field: str) -> None:
    if teacher != "parent":
        locate(teacher)
        return
    parent = stages_before_compression(recipe)
    if index < parent:
        raise RecipeError(
            f"{field}: 'parent' is the model that enters the first compressing stage, and this stage comes before it. "
            "Leave distill out here, or give the directory of a trained checkpoint."
        )
    if parent == 0 and trained_labels(config) is None:
        raise RecipeError(
            f"{field}: 'parent' would be {recipe.model}, whose head was never trained. Put a finetune stage first, or "
            "give the directory of a trained checkpoint."
        )


def check_labels(recipe: Recipe, config: dict[str, Any], labels: Sequence[str]) -> None:
    """A checkpoint of ours serves the labels it was trained for, and a teacher knows the same."""
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if isinstance(spec, FinetuneSpec) and spec.distill and spec.distill.teacher != "parent":
            taught = trained_labels(read_config(locate(spec.distill.teacher)))
            if taught is None or set(taught) != set(labels):
                raise ModelError(
                    f"stages.{index}.finetune.distill.teacher: {spec.distill.teacher} was trained for the labels "
                    f"{', '.join(taught or ('(none)',))}; the data has {', '.join(labels)}. Give a teacher of the same."
                )
    known = trained_labels(config)
    if KEY in config and known is not None and set(known) != set(labels):
        raise ModelError(
            f"model: {recipe.model} was trained for the labels {', '.join(known)}; the data has {', '.join(labels)}. "
            "Give data with the same labels (data.labels renames them), or start from the pretrained model."
        )


def check_folds(recipe: Recipe, classes: Mapping[str, int]) -> None:
    """Every class of train has a row for each fold of an ensemble. classes: {label: rows of train}."""
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if not isinstance(spec, EnsembleSpec) or spec.by != "folds":
            continue
        for label, count in classes.items():
            if 0 < count < spec.members:
                raise DataError(
                    f"stages.{index}.ensemble.members: {spec.members} folds, but train has only {count} of the "
                    f"class {label!r}, and each fold needs one. Give {f'at most {count}, or ' * (count > 1)}by: seeds."
                )


def check_output(recipe: Recipe, place: Path) -> None:
    """Whether the output can be written and the disk holds what a run from the start will leave."""
    parameters = _initial_state(place, read_config(place), labels=2).parameters
    output = Path(recipe.output)
    refuse_foreign(output)
    existing = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise MachineError(f"output: {existing} is a file. Give the path of a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise MachineError(f"output: no permission to write {existing}. Give an output that you may write.")
    free = shutil.disk_usage(existing).free
    specs = [stage_spec(stage) for stage in recipe.stages]
    members = max((spec.members for spec in specs if isinstance(spec, EnsembleSpec)), default=0)
    needed = parameters * (_CHECKPOINT_BYTES + 4 * (len(specs) + 2 + members))
    if free < needed:
        raise MachineError(
            f"output: {existing} has {free / 1e9:.2f} GB free and the run needs about {needed / 1e9:.2f} GB. "
            "Free some space, or give an output on another disk."
        )


def _initial_state(place: Path, config: dict[str, Any], labels: int) -> _State:
    """The network with a head for `labels`: every family's is a dense layer (BERT's is its pooler) and a classifier."""
    hidden = hidden_size(config)
    body = {name: math.prod(shape) for name, shape in _tensors(place).items() if _is_body(name)}
    head = hidden * hidden + hidden * labels
    parameters = sum(body.values()) + head + hidden + labels
    shapes, family = block_shapes(config), family_of(config["model_type"])
    dimensions = Dimensions(
        hidden,
        head_size(config),
        shapes,
        head,
        sum(size for name, size in body.items() if name.endswith(_EVERY_TOKEN)),
        is_gated(config),
        queries_per_key(config),
        int(config[family.stacks[0].layers]) // len(shapes) if family.shared else 1,
    )
    return _State(dimensions, parameters)


def _tensors(place: Path) -> dict[str, tuple[int, ...]]:
    return {name: shape for file in weight_files(place) for name, shape in read_header(file).items()}


_HEADS = frozenset(
    {
        *("cls", "classifier", "decoder", "head", "pooler", "pre_classifier", "predictions", "qa_outputs"),
        *("discriminator_predictions", "generator_predictions", "mask_predictions", "lm_predictions"),
        *("generator_lm_head", "lm_head", "vocab_layer_norm", "vocab_projector", "vocab_transform"),
    }
)  # first or second part of a tensor's name


def _is_body(tensor: str) -> bool:
    """Whether a tensor is of the embeddings or a block; files also hold pretraining heads, and old ones buffers."""
    return not _HEADS & set(tensor.split(".")[:2]) and not tensor.endswith("position_ids")


def _token_lengths(place: Path, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, special ones included; by the fast tokenizer's file, else about four characters a token."""
    file = place / "tokenizer.json"
    if not file.exists():
        return [max(3, len(text) // 4) for text in texts]
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower one
        raise ModelError(f"model: {file} is broken ({error}). Fetch or save the checkpoint again.") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(list(texts))]


def _forecasts(
    recipe: Recipe, state: _State, config: dict[str, Any], rows: dict[str, int], length: float, longest: int
) -> list[Forecast]:
    rate = _multiplication_rate() * _EFFICIENCY
    forecasts = []
    for stage in recipe.stages:
        spec = stage_spec(stage)
        work = _ensemble_work if isinstance(spec, EnsembleSpec) else _work
        flops, memory = work(spec, state, rows, length, longest)
        state = state.with_shapes(_shapes_after(spec, state.shapes, stage_kind(stage), config))
        macs = macs_per_token(state.dimensions, length)
        forecasts.append(Forecast(stage_kind(stage), state.parameters, macs, flops / rate, memory, flops))
    return forecasts


def _work(spec: object, state: _State, rows: dict[str, int], length: float, longest: int) -> tuple[float, int]:
    """Operations and peak bytes of one stage."""
    forward = 2 * macs_per_token(state.dimensions, length) * length
    memory = _LIBRARY_BYTES + 8 * state.parameters
    if isinstance(spec, FinetuneSpec):
        evaluations = spec.epochs * spec.evaluations_per_epoch * rows["validation"] * forward
        training = _learning(spec, state, rows["train"], length) + evaluations
        return training, _LIBRARY_BYTES + _learning_bytes(spec, state, rows["train"], longest)
    if isinstance(spec, NarrowSpec):
        return _TRAINING_COST * min(spec.rows, rows["train"]) * forward, memory
    if isinstance(spec, ShortenSpec):
        passes = sum(len(state.shapes) - count for count in range(spec.remove)) if spec.score == "loss" else 1
        return passes * min(spec.rows, rows["train"]) * forward, memory
    if isinstance(spec, SensitivitySpec):
        return (_TRAINING_COST + _REPLAYS) * min(spec.rows, rows["train"]) * forward, memory
    measures = (isinstance(spec, PruneSpec) and spec.method != "magnitude") or (
        isinstance(spec, QuantizeSpec) and (spec.method == "gptq" or spec.scheme == "int8_static")
    )
    if measures and isinstance(spec, PruneSpec | QuantizeSpec):
        return _REPLAYS * min(spec.rows, rows["train"]) * forward, memory
    return 0.0, memory


def _ensemble_work(
    spec: EnsembleSpec, state: _State, rows: dict[str, int], length: float, longest: int
) -> tuple[float, int]:
    """The members' trainings, their answers to train and validation, and the training of the one that learns them."""
    held = rows["train"] // spec.members
    seen = {"train": rows["train"] - held, "validation": held} if spec.by == "folds" else rows
    member, _ = _work(spec.finetune, state, seen, length, longest)
    one, memory = _work(spec.finetune, state, rows, length, longest)
    answers = 2 * macs_per_token(state.dimensions, length) * length * (rows["train"] + rows["validation"])
    return spec.members * (member + answers) + one, memory + 4 * spec.members * state.parameters


def _learning(spec: FinetuneSpec, state: _State, rows: int, length: float) -> float:
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


def _learning_bytes(spec: FinetuneSpec, state: _State, rows: int, longest: int) -> int:
    """Peak bytes of training: what never trains has no gradient, no moments, and keeps nothing for the backward."""
    blocks = min(frozen_by_step(spec, group_names(state.shapes), -(-rows // spec.batch_size)))
    batch, hidden = spec.batch_size * longest, state.dimensions.hidden
    moving = state.parameters
    if blocks:
        above = sum(all_block_parameters(shape, state.dimensions) for shape in state.shapes[blocks:])
        moving = above + state.dimensions.head_parameters
    return training_bytes(moving, hidden, len(state.shapes) - blocks, batch) + 4 * (state.parameters - moving)


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


def _cache_notes(recipe: Recipe, state: _State, config: dict[str, Any], rows: int, length: float) -> Iterator[str]:
    """Where frozen blocks will run at every step for want of space; MachineError where a cache is required."""
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        training = _training(spec)
        if training and (options := _cache_options(training)):
            reason = _no_cache(training, options, state, rows, length, Path(recipe.output))
            if reason and options.required:
                raise MachineError(f"{_field(index, stage)}.cache: required, but {reason}. Give cache: auto.")
            if reason and _frozen_epochs(training, state, rows):
                yield f"{_field(index, stage)}: frozen blocks will run at every step: {reason}"
        state = state.with_shapes(_shapes_after(spec, state.shapes, stage_kind(stage), config))


def _field(index: int, stage: Any) -> str:
    """Where a stage says how it trains."""
    inside = ".finetune" if isinstance(stage_spec(stage), EnsembleSpec) else ""
    return f"stages.{index}.{stage_kind(stage)}{inside}"


def _frozen_epochs(spec: FinetuneSpec, state: _State, rows: int) -> list[Run]:
    steps = -(-rows // spec.batch_size)
    return _cached(spec, frozen_by_step(spec, group_names(state.shapes), steps), steps)


def _no_cache(
    spec: FinetuneSpec, options: CacheSpec, state: _State, rows: int, length: float, output: Path
) -> str | None:
    """Why the outputs of frozen blocks can't be kept, as far as can be foretold."""
    if not _frozen_epochs(spec, state, rows):
        return f"no block stays frozen for {options.epochs:g} epochs"
    halved = options.dtype in ("bfloat16", "float16") or (options.dtype == "auto" and spec.precision == "bfloat16")
    size = rows * length * state.dimensions.hidden * (2 if halved else 4)
    existing = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > min(options.bytes, free):
        return f"their outputs take about {size / 1e9:.2f} GB; {min(options.bytes, free) / 1e9:.2f} GB may be used"
    return None


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
