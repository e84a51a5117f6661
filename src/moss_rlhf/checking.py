"""Everything that can be found wrong, or foretold, before any work: reads files, imports no torch."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.data import DataCheck, check_data
from moss_rlhf.errors import MachineError, ModelError, RecipeError
from moss_rlhf.files import read_json
from moss_rlhf.model import memory
from moss_rlhf.model.anatomy import FAMILIES, BlockShape, family_of
from moss_rlhf.model.config import (
    KEY,
    block_shapes,
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
    training_bytes,
    training_flops,
    units_kept,
)
from moss_rlhf.model.locate import locate, read_header, weight_files
from moss_rlhf.model.vocabulary import KINDS
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    FinetuneSpec,
    NarrowSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
    stage_kind,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.rundir import refuse_foreign
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.lengths import choose_max_length, length_facts, row_lengths

_EFFICIENCY = 0.5  # of a plain matrix product's speed, reached in training (docs/LOG.md)
_LIBRARY_BYTES = 1100 * 2**20  # torch, transformers, datasets, and what their allocators keep (measured)
_CHECKPOINT_BYTES = 28  # a parameter's share of two resume states (weights and two moments) and the best weights
_LOGIT_BYTES = 12  # of a token and word, in training: the logits, their log probabilities, the gradient
_EVERY_TOKEN = (
    *("embeddings_project.weight", "embedding_hidden_mapping_in.weight", "encoder.conv.conv.weight"),
    *("project_in.weight", "project_out.weight"),
)
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
    speaks: bool  # a language model, whose head gives logits for tokens

    @property
    def shapes(self) -> tuple[BlockShape, ...]:
        return self.dimensions.blocks

    @property
    def network(self) -> memory.Network:
        vocabulary = self.dimensions.projection_parameters // self.dimensions.hidden if self.speaks else 0
        return memory.Network(self.dimensions, self.parameters, vocabulary)

    def with_shapes(self, shapes: Sequence[BlockShape]) -> _State:
        def count(blocks: Sequence[BlockShape]) -> int:
            return sum(all_block_parameters(shape, self.dimensions) for shape in blocks)

        parameters = self.parameters - count(self.shapes) + count(shapes)
        dimensions = dataclasses.replace(self.dimensions, blocks=tuple(shapes))
        return _State(dimensions, parameters, self.speaks)


def check(recipe: Recipe, progress: Progress | None = None) -> Check:
    """Validate everything that a run would stumble over, and foretell its stages.

    raises   UserError: the first fault found, in the order model, stages, output, data.
    """
    place = locate(recipe.model)
    config = read_config(place)
    check_stages(recipe, place)
    check_output(recipe, place)
    task = TASKS[recipe.task]
    known = trained_labels(config) if task.has_classes else None
    data = check_data(
        recipe.data, task.columns, seed=recipe.seed, known_labels=known, progress=progress or Progress(quiet=True)
    )
    check_labels(recipe, config, data.labels)
    lengths = {split: _token_lengths(place, texts) for split, texts in data.samples.items()}
    limit = position_limit(config, float("inf"))
    wanted = recipe.data.max_length
    longest = choose_max_length(wanted, lengths["train"], task.longest(wanted, limit))
    tokens = {split: length_facts(values, longest, task.cuts) for split, values in lengths.items()}
    state = _initial_state(place, config, recipe.task, len(data.labels))
    pieces = {split: row_lengths(values, longest, task.cuts) for split, values in lengths.items()}
    rows = {
        split: round(facts["rows"] * len(pieces[split]) / len(lengths[split])) for split, facts in data.facts.items()
    }
    stages = tuple(_forecasts(recipe, state, config, rows, pieces["train"].tolist(), longest))
    return Check(data, tokens, state.parameters, stages, data.notes)


def check_stages(recipe: Recipe, place: Path) -> None:
    """Whether the model can go through the stages: something to remove, something left, a teacher that is one."""
    config = read_config(place)
    _check_family(recipe, config)
    _check_export(recipe, config)
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    shapes = block_shapes(config)
    quantized = config.get(KEY, {}).get("quantization")
    for index, stage in enumerate(recipe.stages):
        field, spec = f"stages.{index}.{stage_kind(stage)}", stage_spec(stage)
        if quantized:
            raise ModelError(f"{field}: {place} is quantized already; give the checkpoint from before quantization.")
        shapes = _shapes_after(spec, shapes, field, config)
        if isinstance(spec, QuantizeSpec):
            _check_scheme(spec.scheme, recipe.export, field)
        if isinstance(spec, TrimVocabularySpec):
            _check_trimming(spec, place, config, field)
        if isinstance(spec, ShortenSpec) and family_of(config["model_type"]).shared:
            raise RecipeError(f"{field}: the layers of a {config['model_type']} share one block.")
        if isinstance(spec, FinetuneSpec) and spec.distill:
            _check_teacher(recipe, index, spec.distill.teacher, config, f"{field}.distill.teacher")


def _check_family(recipe: Recipe, config: dict[str, Any]) -> None:
    """A task is served by one kind of network."""
    kind, task = family_of(config["model_type"]).kind, TASKS[recipe.task]
    if kind == task.families:
        return
    fitting = ", ".join(sorted(name for name, family in FAMILIES.items() if family.kind == task.families))
    other = next(name for name, served in TASKS.items() if served.families == kind)
    raise ModelError(
        f"model: {recipe.model} is {_ARTICLES[kind]} ({config['model_type']}), and {recipe.task} takes "
        f"{_ARTICLES[task.families]}: {fitting}. Give one of these, or set task: {other}."
    )


_ARTICLES = {"encoder": "an encoder", "decoder": "a decoder", "encoder-decoder": "an encoder-decoder"}


def _check_export(recipe: Recipe, config: dict[str, Any]) -> None:
    """Encoders go to ONNX, the others to CTranslate2, which holds one number of heads."""
    kind = TASKS[recipe.task].families
    fitting = "onnx" if kind == "encoder" else "ctranslate2"
    if unfit := [name for name in recipe.export if name != fitting]:
        raise RecipeError(
            f"export: {unfit[0]} does not serve {_ARTICLES[kind]}. Give [{fitting}], or leave export out."
        )
    if fitting not in recipe.export or fitting == "onnx":
        return
    if find_spec("ctranslate2") is None:
        raise MachineError("export: CTranslate2 is not installed: pip install 'moss-rlhf[ctranslate2]'.")
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if isinstance(spec, NarrowSpec) and max(spec.macs, spec.parameters, spec.latency):
            raise RecipeError(
                f"stages.{index}.narrow: a budget leaves the layers different numbers of heads, and CTranslate2 holds "
                "one. Give shares of heads and feed_forward, or leave export out."
            )


def _check_scheme(scheme: str, export: Sequence[str], field: str) -> None:
    held = {"onnx": ("int8", "int8_static"), "ctranslate2": ("int8",)}
    for name in export:
        if scheme not in held[name]:
            raise RecipeError(f"{field}.scheme: {scheme} can't be exported to {name}. Give int8, or leave export out.")


def _check_trimming(spec: TrimVocabularySpec, place: Path, config: dict[str, Any], field: str) -> None:
    """Whether there is a tokenizer that can be cut, and what it shall be cut by."""
    for file in spec.corpora:
        if not Path(file).is_file():
            raise RecipeError(f"{field}.corpora: there is no file {file}. Paths are relative to the working directory.")
    tokenizer = place / "tokenizer.json"
    if not tokenizer.exists() and config["model_type"] == "marian":
        raise ModelError(f"{field}: Marian's tokenizer has no tokenizer.json and can't be cut. Leave this stage out.")
    kind = read_json(tokenizer)["model"]["type"] if tokenizer.exists() else KINDS[0]
    if kind not in KINDS:
        raise ModelError(
            f"{field}: the tokenizer is of the kind {kind}; {', '.join(KINDS)} can be cut. Leave this stage out."
        )


def _shapes_after(
    spec: object, shapes: tuple[BlockShape, ...], field: str, config: dict[str, Any]
) -> tuple[BlockShape, ...]:
    if isinstance(spec, NarrowSpec):
        return _narrowed(spec, shapes, field, queries_per_key(config))
    if isinstance(spec, ShortenSpec):
        return _shortened(spec, shapes, field)
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


def _shortened(spec: ShortenSpec, shapes: tuple[BlockShape, ...], field: str) -> tuple[BlockShape, ...]:
    """Which go is not known yet: foretold as if the last ones, of an encoder-decoder the decoder's unless told."""
    crossing = sum(bool(shape.cross_heads) for shape in shapes)  # of a decoder beside an encoder
    stacks = {"encoder": len(shapes) - crossing, "decoder": crossing} if crossing else {"": len(shapes)}
    chosen = [stack for stack in stacks if spec.stack in ("auto", stack) or not stack]
    most = sum(stacks[stack] - 1 for stack in chosen)
    if spec.remove > most:
        of = f"of {sum(stacks[stack] for stack in chosen)} layers"
        each = " in a stack" if len(chosen) > 1 else ""
        raise RecipeError(f"{field}.remove: {spec.remove} {of} would leave none{each}. Give 1 to {most}.")
    if spec.stack == "encoder" and crossing:
        return shapes[spec.remove :]
    from_decoder = min(spec.remove, crossing - 1) if crossing else spec.remove
    return shapes[spec.remove - from_decoder : len(shapes) - from_decoder]


def _heads_kept(count: int, removed: float, queries: int) -> int:
    """Query heads go with the key-value head that they share, those of the last one singly."""
    return units_kept(count // queries, removed) * queries if count > queries else units_kept(count, removed)


def _narrowed(spec: NarrowSpec, shapes: tuple[BlockShape, ...], field: str, queries: int) -> tuple[BlockShape, ...]:
    budget = max(spec.macs, spec.parameters, spec.latency)  # spent where it costs least: foretold as if evenly
    heads, neurons = (budget, budget) if budget else (spec.heads, spec.feed_forward)
    narrowed = tuple(
        BlockShape(
            _heads_kept(shape.heads, heads, queries),
            units_kept(shape.feed_forward, neurons, spec.multiple_of),
            units_kept(shape.cross_heads, heads) if shape.cross_heads else 0,
        )
        for shape in shapes
    )
    if narrowed == shapes and not spec.hidden:
        raise RecipeError(
            f"{field}: heads {spec.heads} and feed_forward {spec.feed_forward} remove less than one unit of "
            f"{shapes[0].heads} heads and {shapes[0].feed_forward} neurons. Give larger shares."
        )
    return narrowed


def _check_teacher(recipe: Recipe, index: int, teacher: str, config: dict[str, Any], field: str) -> None:
    if teacher != "parent":
        kind = family_of(read_config(locate(teacher))["model_type"]).kind
        if kind != TASKS[recipe.task].families:
            raise RecipeError(f"{field}: {teacher} is {_ARTICLES[kind]}, which does not serve {recipe.task}.")
        return
    parent = stages_before_compression(recipe)
    if index < parent:
        raise RecipeError(
            f"{field}: 'parent' is the model that enters the first compressing stage, and this stage comes before it. "
            "Leave distill out here, or give the directory of a trained checkpoint."
        )
    if parent == 0 and TASKS[recipe.task].has_classes and trained_labels(config) is None:
        raise RecipeError(
            f"{field}: 'parent' would be {recipe.model}, whose head was never trained. Put a finetune stage first, or "
            "give the directory of a trained checkpoint."
        )


def check_labels(recipe: Recipe, config: dict[str, Any], labels: Sequence[str]) -> None:
    """A checkpoint of ours serves the labels it was trained for, and a teacher knows the same."""
    if not TASKS[recipe.task].has_classes:
        return
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


def check_output(recipe: Recipe, place: Path) -> None:
    """Whether the output can be written and the disk holds what a run from the start will leave."""
    parameters = _initial_state(place, read_config(place), recipe.task, labels=2).parameters
    output = Path(recipe.output)
    refuse_foreign(output)
    existing = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise MachineError(f"output: {existing} is a file. Give the path of a directory.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise MachineError(f"output: no permission to write {existing}. Give an output that you may write.")
    free = shutil.disk_usage(existing).free
    needed = parameters * (_CHECKPOINT_BYTES + 4 * (len(recipe.stages) + 2))
    if free < needed:
        raise MachineError(
            f"output: {existing} has {free / 1e9:.2f} GB free and the run needs about {needed / 1e9:.2f} GB. "
            "Free some space, or give an output on another disk."
        )


def _initial_state(place: Path, config: dict[str, Any], task: str, labels: int) -> _State:
    """The network with its head: of a language model as it stands in the file, else a new one for `labels`.

    Every family's classifier is a dense layer (BERT's is its pooler) and a projection.
    """
    hidden, tensors = hidden_size(config), _tensors(place)
    if TASKS[task].has_classes:
        body = {name: math.prod(shape) for name, shape in tensors.items() if _is_body(name)}
        head = hidden * hidden + hidden * labels
        parameters, vocabulary = sum(body.values()) + head + hidden + labels, 0
    else:
        body = {name: math.prod(shape) for name, shape in tensors.items() if _is_parameter(name, tensors, config)}
        head, parameters, vocabulary = 0, sum(body.values()), _table_weights(body)
    shapes, family = block_shapes(config), family_of(config["model_type"])
    dimensions = Dimensions(
        hidden,
        head_size(config),
        shapes,
        head,
        vocabulary + sum(size for name, size in body.items() if name.endswith(_EVERY_TOKEN)),
        is_gated(config),
        queries_per_key(config),
        int(config[family.stacks[0].layers]) // len(shapes) if family.shared else 1,
    )
    return _State(dimensions, parameters, not TASKS[task].has_classes)


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


_TABLES = (
    "lm_head.weight",
    "embed_out.weight",
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "shared.weight",
)
_BUFFERS = ("position_ids", ".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq", "final_logits_bias")
"""Of a language model's file: its tables of tokens, the one that gives the logits first; and what is no parameter."""


def _is_parameter(name: str, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a language model's tensor is a parameter of its own; older files hold tied ones twice."""
    shared = any(other.endswith("shared.weight") for other in tensors)
    twice = shared and name.endswith("embed_tokens.weight")
    tied = config.get("tie_word_embeddings") is True and name.endswith(_TABLES[:2])
    return not (twice or tied or name.endswith(_BUFFERS))


def _table_weights(body: Mapping[str, int]) -> int:
    """Weights of the table that gives logits: the head's own, else that of the embeddings."""
    return next((size for table in _TABLES for name, size in body.items() if name.endswith(table)), 0)


def _token_lengths(place: Path, rows: Sequence[Sequence[str]]) -> list[int]:
    """Tokens of the longest text of each row."""
    columns = [_text_lengths(place, column) for column in zip(*rows, strict=True)]
    return [max(lengths) for lengths in zip(*columns, strict=True)]


def _text_lengths(place: Path, texts: Sequence[str]) -> list[int]:
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
    recipe: Recipe, state: _State, config: dict[str, Any], rows: dict[str, int], lengths: Sequence[int], longest: int
) -> list[Forecast]:
    length = float(np.mean(lengths))
    rate = _multiplication_rate() * _EFFICIENCY
    forecasts = []
    for stage in recipe.stages:
        spec = stage_spec(stage)
        flops, memory = _work(spec, state, rows, lengths, longest)
        state = state.with_shapes(_shapes_after(spec, state.shapes, stage_kind(stage), config))
        macs = macs_per_token(state.dimensions, length)
        forecasts.append(Forecast(stage_kind(stage), state.parameters, macs, flops / rate, memory, flops))
    return forecasts


def _work(spec: object, state: _State, rows: dict[str, int], lengths: Sequence[int], longest: int) -> tuple[float, int]:
    """Operations and peak bytes of one stage; `lengths` are tokens of a sample of the training rows."""
    length = float(np.mean(lengths))
    forward = 2 * macs_per_token(state.dimensions, length) * length
    if isinstance(spec, FinetuneSpec):
        tokens = spec.epochs * rows["train"] * length
        evaluations = spec.epochs * spec.evaluations_per_epoch * rows["validation"] * forward
        training = training_flops(state.dimensions, length, tokens) + evaluations
        batch = spec.batch_size * longest
        logits = _LOGIT_BYTES * batch * state.dimensions.projection_parameters // state.dimensions.hidden
        return training, _LIBRARY_BYTES + logits + training_bytes(
            state.parameters, state.dimensions.hidden, len(state.shapes), batch
        )
    count = min(getattr(spec, "rows", 0), rows["train"])
    passes = _passes(spec, len(state.shapes)) * count * forward
    return passes, _measuring_bytes(spec, state.network, memory.Sample(count, length, float(np.max(lengths))))


def _passes(spec: object, layers: int) -> float:
    """How often a stage goes through its rows, in forwards."""
    if isinstance(spec, NarrowSpec):
        return _TRAINING_COST
    if isinstance(spec, ShortenSpec):
        return sum(layers - count for count in range(spec.remove)) if spec.score == "loss" else 1
    if isinstance(spec, SensitivitySpec):
        return _TRAINING_COST + _REPLAYS
    return _REPLAYS if _measures(spec) else 0


def _measures(spec: object) -> bool:
    """Whether pruning or quantizing looks at rows."""
    if isinstance(spec, PruneSpec):
        return spec.method != "magnitude" or spec.allocation != "uniform"
    return isinstance(spec, QuantizeSpec) and (spec.method == "gptq" or spec.scheme == "int8_static")


def _measuring_bytes(spec: object, network: memory.Network, sample: memory.Sample) -> int:
    """Peak bytes of a stage that trains nothing (benchmarks/forecast.py)."""
    base = memory.LIBRARY_BYTES + network.weights
    gradient, calibration = memory.gradient_bytes(network, sample), memory.calibration_bytes
    if isinstance(spec, NarrowSpec):
        repair = memory.repair_bytes(network, sample) if spec.repair else 0
        return base + max(gradient + (network.weights if spec.repair else 0), repair)
    if isinstance(spec, ShortenSpec):
        copies = 0 if spec.how == "drop" else network.weights
        return base + copies + memory.logits_bytes(network, sample) + memory.pass_bytes(network, sample)
    if isinstance(spec, SensitivitySpec):
        return base + max(gradient, calibration(network, sample, grams=True))
    solves = getattr(spec, "method", None) in ("sparsegpt", "gptq")
    measured = calibration(network, sample, grams=solves, solves=solves) if _measures(spec) else 0
    tables = memory.table_bytes(network) if isinstance(spec, QuantizeSpec) and spec.scheme != "int4" else 0
    return base + max(measured, tables)


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
