"""Everything that can be found wrong, or foretold, before any work: reads files, imports no torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from moss_rlhf.data import DataCheck, check_data
from moss_rlhf.data.cleaning import check_packages
from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import DataError, MachineError, ModelError, RecipeError, nearest
from moss_rlhf.files import read_json
from moss_rlhf.model import memory
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
    refuse_foreign_grid,
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
from moss_rlhf.model.layer_map import refuse_pair
from moss_rlhf.model.locate import locate, read_header, weight_files
from moss_rlhf.model.vocabulary import KINDS
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import (
    RATES,
    AdapterSpec,
    AugmentSpec,
    CacheSpec,
    DistillSpec,
    EnsembleSpec,
    FinetuneSpec,
    NarrowSpec,
    PretrainSpec,
    PruneSpec,
    QuantizeSpec,
    Recipe,
    SensitivitySpec,
    ShortenSpec,
    TrimVocabularySpec,
    settle_distillation,
    stage_kind,
    stage_spec,
    stages_before_compression,
)
from moss_rlhf.rundir import refuse_foreign
from moss_rlhf.strategy import Run, cached_runs, frozen_blocks, lowest_trained
from moss_rlhf.strategy.augmentation import check_masked_model, check_operations, check_translator, language_of
from moss_rlhf.strategy.augmentation.words import Language
from moss_rlhf.tasks import TASKS, TextClassification
from moss_rlhf.tasks.lengths import choose_max_length, length_facts, row_lengths

_EFFICIENCY = 0.5  # of a plain matrix product's speed, reached in training (docs/LOG.md)
_LIBRARY_BYTES = 1100 * 2**20  # torch, transformers, datasets, and what their allocators keep (measured)
_CHECKPOINT_BYTES = 28  # a parameter's share of two resume states (weights and two moments) and the best weights
_LOGIT_BYTES = 12  # of a token and word, in training: the logits, their log probabilities, the gradient
_EVERY_TOKEN = (
    *("embeddings_project.weight", "embedding_hidden_mapping_in.weight", "encoder.conv.conv.weight"),
    *("project_in.weight", "project_out.weight"),
)
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
    asked, recipe = recipe, settled(recipe)
    check_stages(recipe, place)
    check_output(recipe, place)
    check_rows(recipe)
    task = TASKS[recipe.task]
    known = trained_labels(config) if task.has_classes else None
    data = check_data(
        recipe.data, task.columns, seed=recipe.seed, known_labels=known, progress=progress or Progress(quiet=True)
    )
    check_labels(recipe, config, data.labels)
    check_augmentation(recipe, [text for row in data.samples["train"] for text in row])
    check_folds(recipe, data.facts["train"].get("classes", {}))
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
    mean = float(np.mean(pieces["train"]))
    notes = [*_cache_notes(recipe, state, config, rows["train"], mean), *_decided(asked, recipe), *_later(recipe)]
    return Check(data, tokens, state.parameters, stages, (*data.notes, *notes))


def settled(recipe: Recipe) -> Recipe:
    """The recipe with what depends on the model decided: whether `distill: auto` finds a parent that was trained."""
    serves = not TASKS[recipe.task].has_classes or trained_labels(read_config(locate(recipe.model))) is not None
    return settle_distillation(recipe, serves)


def _decided(asked: Recipe, recipe: Recipe) -> Iterator[str]:
    for index, (before, after) in enumerate(zip(asked.stages, recipe.stages, strict=True)):
        if before != after and stage_spec(after).distill is not None:
            yield f"stages.{index}.finetune learns from its parent (distill: auto; none turns it off)."


def check_rows(recipe: Recipe) -> None:
    """Whether what `data` asks of the rows can be done: for this task, with these packages."""
    check_packages(recipe.data.clean)
    if recipe.data.truncation != "head" and not isinstance(TASKS[recipe.task], TextClassification):
        raise RecipeError(
            f"data.truncation: {recipe.data.truncation} is for text classification; {recipe.task} reads texts from "
            "their head. Leave it out."
        )
    if not TASKS[recipe.task].has_classes and (field := _asks_for_labels(recipe)):
        raise RecipeError(f"{field}: wants labelled rows, and those of {recipe.task} have none. Leave it out.")


def _asks_for_labels(recipe: Recipe) -> str | None:
    """The first field of `data` that says something of labels."""
    clean = recipe.data.clean
    found = {
        "data.balance": recipe.data.balance != "none",
        "data.clean.conflicts": clean is not None and clean.conflicts != "off",
        "data.clean.label_errors": clean is not None and clean.label_errors != "off",
        "data.clean.ablate": clean is not None and clean.ablate,
    }
    return next((field for field, asked in found.items() if asked), None)


def _later(recipe: Recipe) -> list[str]:
    """What moss run does to the rows before the first stage, and a check has not counted."""
    found = {
        "data.clean has not been done yet: rows are those before it.": recipe.data.clean and recipe.data.clean.checks,
        "data.balance has not been done yet: rows are those before it.": recipe.data.balance != "none",
    }
    return [sentence for sentence, holds in found.items() if holds]


def check_stages(recipe: Recipe, place: Path) -> None:
    """Whether the model can go through the stages: something to remove, something left, a teacher that is one."""
    config = read_config(place)
    family = family_of(config["model_type"])
    _check_family(recipe, config)
    _check_export(recipe)
    _check_search(recipe)
    for file in weight_files(place):
        read_header(file)  # says which file is broken
    refuse_foreign_grid(config, place)
    shapes = block_shapes(config)
    depths: list[int] = []  # as each stage finds it
    quantized = config.get(KEY, {}).get("quantization")
    for index, stage in enumerate(recipe.stages):
        field, spec = f"stages.{index}.{stage_kind(stage)}", stage_spec(stage)
        depths.append(_layers(shapes, config))
        if quantized:
            raise ModelError(f"{field}: {place} is quantized already; give the checkpoint from before quantization.")
        shapes = _shapes_after(spec, shapes, field, config)
        if isinstance(spec, QuantizeSpec):
            _check_scheme(spec.scheme, recipe.export, family.kind, field)
        if isinstance(spec, TrimVocabularySpec):
            _check_trimming(spec, place, config, field)
        if isinstance(spec, EnsembleSpec) and not TASKS[recipe.task].has_classes:
            raise RecipeError(
                f"{field}: members are combined by the probabilities of classes, and {recipe.task} has none. Leave it "
                "out."
            )
        if isinstance(spec, ShortenSpec) and family.shared:
            raise RecipeError(f"{field}: the layers of a {config['model_type']} share one block.")
        if _training(spec):
            _check_finetuning(recipe, index, shapes, depths, place)
        if isinstance(spec, PretrainSpec):
            _check_pretraining(recipe, index, config, field)
    if "compressed-tensors" in recipe.export:
        _check_compressed_tensors(recipe, shapes, config)


def _check_finetuning(
    recipe: Recipe, index: int, shapes: tuple[BlockShape, ...], depths: Sequence[int], place: Path
) -> None:
    """Whether a fine-tuning finds its metric, groups, damage, adapters and teacher; `depths` up to this stage."""
    stage, config = recipe.stages[index], read_config(place)
    spec, field = _training(stage_spec(stage)), _field(index, stage)
    if spec is None:
        return
    _check_metric(spec.metric, recipe.task, f"{field}.metric")
    _check_layers(spec, shapes, config, field)
    if spec.layers == "by_damage":
        _check_damage(recipe, index, place, field)
    if spec.adapter:
        _check_adapter(recipe, index, spec.adapter, config, f"{field}.adapter")
    if isinstance(spec.distill, DistillSpec):
        _check_teacher(recipe, index, spec.distill.teacher, config, f"{field}.distill.teacher")
        _check_layer_map(spec.distill, depths, stages_before_compression(recipe), f"{field}.distill.layers")


def _check_compressed_tensors(recipe: Recipe, shapes: tuple[BlockShape, ...], config: dict[str, Any]) -> None:
    """Whether vLLM's format will hold what the stages leave."""
    specs, kind = [stage_spec(stage) for stage in recipe.stages], config["model_type"]
    family, quantize = family_of(kind), next((spec for spec in specs if isinstance(spec, QuantizeSpec)), None)
    narrowed = [spec for spec in specs if isinstance(spec, NarrowSpec)]
    heads, hidden = {shape.heads for shape in shapes}, hidden_size(config)
    uneven = len(set(shapes)) > 1 or any(spec.macs or spec.parameters or spec.latency for spec in narrowed)
    cut_hidden = any(spec.hidden for spec in narrowed) or (KEY in config and "hidden" in config[KEY])
    odd_heads = not family.head_size and any(count * head_size(config) != hidden for count in heads)
    odd_heads |= family.heads_divide_hidden and any(hidden % count for count in heads)
    faults = {
        "it holds quantized models. Put quantize with scheme int4 or int8 last.": (
            quantize is None or quantize.scheme == "int8_static"
        ),
        f"vLLM, which reads it, serves no encoder-decoder such as a {kind}.": family.kind == "encoder-decoder",
        f"a {kind} keeps its matrices transposed, in Conv1D layers, which it can't hold.": family.transposed,
        f"the stock config of a {kind} can't say what the stages leave: {_UNIFORM}": (
            uneven or odd_heads or (cut_hidden and (not family.head_size or family.scales_embeddings))
        ),
        "the package is missing: pip install 'moss-rlhf[vllm]'.": find_spec("compressed_tensors") is None,
    }
    for fault, holds in faults.items():
        if holds:
            raise RecipeError(f"export: compressed-tensors: {fault}")


_UNIFORM = "shapes that differ from block to block, fewer heads or a smaller hidden size. Export to another format."


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


def _check_adapter(recipe: Recipe, index: int, adapter: AdapterSpec, config: dict[str, Any], field: str) -> None:
    """Whether peft is there, and merging would undo no pruning that is to stay."""
    if importlib.util.find_spec("peft") is None:
        raise MachineError(f"{field}: peft is not installed. Install it with: pip install 'moss-rlhf[adapters]'.")
    pruned = config.get(KEY, {}).get("pruned") or any(
        isinstance(stage_spec(stage), PruneSpec) for stage in recipe.stages[:index]
    )
    if pruned and not adapter.keep_zeros:
        raise RecipeError(
            f"{field}: the model is pruned, and merging adapters into it would undo that. Set keep_zeros: true, which "
            "sets the zeros again after merging, or leave adapter out."
        )


def _check_pretraining(recipe: Recipe, index: int, config: dict[str, Any], field: str) -> None:
    """Whether there are texts to read, and the model still has the hidden size that a language model's head fits."""
    spec = stage_spec(recipe.stages[index])
    if spec.texts != "task":
        read_texts(spec.texts, f"{field}.texts", limit=1)
    narrowed = any(
        isinstance(before, NarrowSpec) and before.hidden for before in map(stage_spec, recipe.stages[:index])
    )
    if narrowed or hidden_size(config) != config[family_of(config["model_type"]).hidden]:
        raise RecipeError(
            f"{field}: the hidden size is narrowed before it, and a language model's head fits the whole one. Put "
            "pretrain before the stage that narrows it."
        )


def _layers(shapes: Sequence[BlockShape], config: dict[str, Any]) -> int:
    """ALBERT's one block is as many layers as it is gone through."""
    family = family_of(config["model_type"])
    return int(config[family.stacks[0].layers]) if family.shared else len(shapes)


def _check_layer_map(spec: DistillSpec, depths: Sequence[int], parent: int, field: str) -> None:
    """Whether pairs of layers name layers; `depths` up to this stage."""
    if isinstance(spec.layers, str):
        return
    if spec.teacher == "parent":
        deep = depths[parent]
    else:
        config = read_config(locate(spec.teacher))
        deep = _layers(block_shapes(config), config)
    for pair in spec.layers:
        refuse_pair(pair, depths[-1], deep, field)


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


_RUNTIMES = {"encoder": "onnx", "decoder": "ctranslate2", "encoder-decoder": "ctranslate2"}
_HELD = {"onnx": ("ONNX", ("int8", "int8_static")), "ctranslate2": ("CTranslate2", ("int8",))}
"""Which runtime serves a kind of network here; a runtime's name, and the schemes that it can hold."""


def _check_export(recipe: Recipe) -> None:
    """Encoders go to ONNX, the others to CTranslate2, which holds one number of heads; vLLM's format: below."""
    kind = TASKS[recipe.task].families
    fitting = _RUNTIMES[kind]
    if unfit := [name for name in recipe.export if name not in (fitting, "compressed-tensors")]:
        raise RecipeError(
            f"export: {unfit[0]} does not serve {_ARTICLES[kind]}. Give [{fitting}], or leave export out."
        )
    if "ctranslate2" not in recipe.export:
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


def _check_scheme(scheme: str, export: Sequence[str], kind: str, field: str) -> None:
    if scheme == "int8_static" and kind != "encoder":
        raise RecipeError(f"{field}.scheme: int8_static is for encoders. Give int8.")
    for title, held in (_HELD[name] for name in export if name in _HELD):  # vLLM's format: below
        other = ", or compressed-tensors" if scheme == "int4" else ""
        if scheme not in held:
            raise RecipeError(f"{field}.scheme: {scheme} can't be exported to {title}. Give int8{other}.")


def _check_trimming(spec: TrimVocabularySpec, place: Path, config: dict[str, Any], field: str) -> None:
    """Whether there is a tokenizer that can be cut, and what it shall be cut by."""
    for file in spec.corpora:
        read_texts(file, f"{field}.corpora", limit=1)
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
        _check_groups(spec.group_size, shapes, config, field)
    if isinstance(spec, FinetuneSpec) and spec.quantization_aware and spec.quantization_aware.scheme == "int4":
        _check_groups(spec.quantization_aware.group_size, shapes, config, f"{field}.quantization_aware")
    return shapes


def _check_groups(group_size: int, shapes: tuple[BlockShape, ...], config: dict[str, Any], field: str) -> None:
    """Groups must fill the rows of every matrix."""
    widths = {hidden_size(config)} | {
        width for shape in shapes for width in (shape.heads * head_size(config), shape.feed_forward)
    }
    for width in sorted(widths):
        if width % group_size:
            raise RecipeError(
                f"{field}.group_size: {group_size} does not divide rows of {width} weights. Give a divisor of "
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
        _check_foreign_teacher(recipe, teacher, field)
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


def _check_foreign_teacher(recipe: Recipe, teacher: str, field: str) -> None:
    """A teacher of the task's family, which knows the model's words."""
    kind = family_of(read_config(locate(teacher))["model_type"]).kind
    if kind != TASKS[recipe.task].families:
        raise RecipeError(f"{field}: {teacher} is {_ARTICLES[kind]}, which does not serve {recipe.task}.")
    _check_vocabulary(locate(recipe.model), locate(teacher), field)


def _check_vocabulary(place: Path, teacher: Path, field: str) -> None:
    """Whether a teacher knows the model's words, as far as tokenizer.json tells; loaded, both are compared again."""
    own, other = (_vocabulary(folder) for folder in (place, teacher))
    if own and other and own.keys() - other.keys():
        raise ModelError(
            f"{field}: the tokenizer of {teacher} has another vocabulary ({len(other)} tokens, the model's "
            f"{len(own)}), so it would read other words than the model. Give a teacher with the same tokenizer, or one "
            "that the model's was cut from."
        )


def _vocabulary(place: Path) -> dict[str, int]:
    """{token: id} of a tokenizer.json; empty where there is none."""
    file = place / "tokenizer.json"
    if not file.exists():
        return {}
    try:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        words = tokenizer["model"]["vocab"]
        pieces = words if isinstance(words, dict) else {piece: index for index, (piece, _) in enumerate(words)}
        return dict(pieces) | {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"model: {file} is broken ({error}). Fetch or save the checkpoint again.") from None


def check_labels(recipe: Recipe, config: dict[str, Any], labels: Sequence[str]) -> None:
    """A checkpoint of ours serves the labels it was trained for, a teacher knows the same, and weights are for them."""
    if not TASKS[recipe.task].has_classes:
        return
    for index, stage in enumerate(recipe.stages):
        spec = stage_spec(stage)
        if isinstance(spec, FinetuneSpec) and spec.loss and isinstance(spec.loss.class_weights, dict):
            _check_weights(spec.loss.class_weights, labels, f"stages.{index}.finetune.loss.class_weights")
        if (
            isinstance(spec, FinetuneSpec)
            and isinstance(spec.distill, DistillSpec)
            and spec.distill.teacher != "parent"
        ):
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


def check_augmentation(recipe: Recipe, texts: Sequence[str]) -> Language | None:
    """Whether the copies asked for can be made of such texts on this machine; returns the language, None without any.

    raises   RecipeError, MachineError or ModelError on what the language, the machine or a model can't do; RecipeError
             where the copies are for a teacher and no stage has one.
    """
    spec = recipe.data.augment
    if spec is None:
        return None
    if spec.use == "distill" and not any(trains_on_copies(spec, stage_spec(stage)) for stage in recipe.stages):
        raise RecipeError(
            "data.augment.use: distill wants a stage with a teacher, and no finetune has distill. "
            "Give one distill, or set use: always."
        )
    language = language_of(spec.language, texts)
    check_operations(operation_names(spec), language, recipe.task)
    if spec.masked_lm:
        check_masked_model(spec.masked_lm.model)
    if spec.back_translation:
        check_translator(spec.back_translation.to, "to")
        check_translator(spec.back_translation.back, "back")
    return language


def operation_names(spec: AugmentSpec) -> list[str]:
    """The operations that a recipe asks for, by their fields."""
    models = [name for name in ("masked_lm", "back_translation") if getattr(spec, name)]
    return [*(name for name in RATES if getattr(spec, name)), *models]


def trains_on_copies(augment: AugmentSpec | None, spec: object) -> bool:
    """Whether a stage trains on the augmented copies: every fine-tuning, or only those with a teacher."""
    if augment is None or not isinstance(spec, FinetuneSpec):
        return False
    return augment.use == "always" or isinstance(spec.distill, DistillSpec)


def _check_weights(weights: Mapping[str, float], labels: Sequence[str], field: str) -> None:
    for label in weights:
        if label not in labels:
            raise RecipeError(f"{field}: the data has no label {label!r}; {nearest(label, labels)}")


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
    parameters = _initial_state(place, read_config(place), recipe.task, labels=2).parameters
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
        copies = (
            recipe.data.augment.copies if recipe.data.augment and trains_on_copies(recipe.data.augment, spec) else 0
        )
        trained = rows | {"train": rows["train"] * (1 + copies)}
        if isinstance(spec, PretrainSpec):
            flops, peak = _reading(spec, state, rows, length)
        else:
            work = _ensemble_work if isinstance(spec, EnsembleSpec) else _work
            flops, peak = work(spec, state, trained, lengths, longest)
        state = state.with_shapes(_shapes_after(spec, state.shapes, stage_kind(stage), config))
        macs = macs_per_token(state.dimensions, length)
        forecasts.append(Forecast(stage_kind(stage), state.parameters, macs, flops / rate, peak, flops))
    return forecasts


def _work(spec: object, state: _State, rows: dict[str, int], lengths: Sequence[int], longest: int) -> tuple[float, int]:
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
    measures = isinstance(spec, PruneSpec | QuantizeSpec) and _measurements(spec) > 0
    measured = calibration(network, sample, grams=solves, solves=solves) if measures else 0
    tables = memory.table_bytes(network) if isinstance(spec, QuantizeSpec) and spec.scheme != "int4" else 0
    return base + max(measured, tables)


def _ensemble_work(
    spec: EnsembleSpec, state: _State, rows: dict[str, int], lengths: Sequence[int], longest: int
) -> tuple[float, int]:
    """The members' trainings, their answers to train and validation, and the training of the one that learns them."""
    held, length = rows["train"] // spec.members, float(np.mean(lengths))
    seen = {"train": rows["train"] - held, "validation": held} if spec.by == "folds" else rows
    member, _ = _work(spec.finetune, state, seen, lengths, longest)
    one, peak = _work(spec.finetune, state, rows, lengths, longest)
    answers = 2 * macs_per_token(state.dimensions, length) * length * (rows["train"] + rows["validation"])
    return spec.members * (member + answers) + one, peak + 4 * spec.members * state.parameters


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


def _measurements(spec: PruneSpec | QuantizeSpec) -> int:
    """How often the network is gone through, block by block."""
    if isinstance(spec, PruneSpec):
        return int(spec.method != "magnitude" or spec.allocation != "uniform")
    scaling = spec.smooth > 0 or spec.method == "awq"
    return int(scaling) + int(spec.method == "gptq" or spec.scheme == "int8_static")


def _reading(spec: PretrainSpec, state: _State, rows: dict[str, int], length: float) -> tuple[float, int]:
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
