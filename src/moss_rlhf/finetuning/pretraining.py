"""Pretrain further: a model learns the language of a domain, then of the task's own texts, before the task.

The body is trained under a language model's head, and stands under the task's own head again afterwards (Sun et al.
2019, arXiv:1905.05583, §5.4; Gururangan et al. 2020, arXiv:2004.10964).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moss_rlhf.data.texts import read_texts
from moss_rlhf.errors import DataError, ModelError
from moss_rlhf.finetuning.companions import Companions, KeptZeros
from moss_rlhf.finetuning.heap import bound_kernel_caches
from moss_rlhf.finetuning.language_head import language_network
from moss_rlhf.finetuning.layers import layer_groups, layer_learning_rates
from moss_rlhf.finetuning.options import EarlyStopping, Optimizer, option
from moss_rlhf.finetuning.packing import Packed, pack
from moss_rlhf.finetuning.restoring import Kind, Restoring, Words, kind_for
from moss_rlhf.finetuning.running import (
    Loop,
    Precision,
    Training,
    evaluation_steps,
    train_network,
    training_folder,
    uses_bfloat16,
)
from moss_rlhf.finetuning.sampling import epoch_batches
from moss_rlhf.finetuning.trainer import SAVE_EVERY_SECONDS, Plan
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.progress import Progress
from moss_rlhf.recipe import PretrainSpec
from moss_rlhf.recipe.options import follows
from moss_rlhf.strategy import SCHEDULES, Judge, Schedule

FEW_TEXTS = 5000
"""Fewer can do harm: on TREC's 5,452 questions the error rose from 2.80 to 3.20 % (arXiv:1905.05583, table 8)."""


@takes_model
@follows(PretrainSpec, "pretrain")
def pretrain(
    model: Model,
    texts: str | Path | Sequence[str],
    *,
    objective: Literal["auto", "masked", "causal", "spans", "infilling"] = "auto",
    epochs: int = 1,
    learning_rate: float = 5e-5,
    mask: float = 0.15,
    whole_words: bool = True,
    batch_size: int = 32,
    max_length: int = 256,
    packed: bool = True,
    held_out: float = 0.05,
    head_first: float = 0.1,
    schedule: Literal["linear", "slanted_triangular", "constant"] = "linear",
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    max_gradient_norm: float = 1.0,
    layer_decay: float = 1.0,
    early_stopping: EarlyStopping | Mapping[str, Any] | None = None,
    evaluations_per_epoch: int = 1,
    precision: Precision = "auto",
    seed: int = 0,
    workspace: str | Path | None = None,
    save_every_seconds: float = SAVE_EVERY_SECONDS,
    progress: Progress | None = None,
) -> Training:
    """Train `model`'s body on plain texts, in place, and leave it with the weights of its best evaluation.

    texts        one a document; or a file: txt with one a line, else the column `text`.
    epochs       0: the model stays as it is, so that a search can try it without.
    objective    auto: masked for encoders, causal for decoders, spans or infilling for encoder-decoders.
    mask         share of the tokens that are masked, or in spans; of no meaning for causal.
    whole_words  masked: all pieces of a word or none.
    max_length   tokens of a row, what the tokenizer adds included.
    packed       rows of that many tokens cut from all texts in a row; else every text begins a row of its own.
    held_out     share of the texts that perplexity is measured on, at least one text; drawn by `seed`.
    head_first   share of the steps in which a head that is new trains alone.
    workspace    as for `finetune`; resumed, it ends in the same bits.
    returns      facts with `before` and `after` on what is held out.
    raises       DataError where there are fewer than two texts; ModelError where the model is quantized, or can't
                 learn the objective; Interrupted after Ctrl-C, once a checkpoint is written.
    """
    if model.quantization:
        raise ModelError("pretrain: the model is quantized already; pretrain it before, then quantize.")
    if epochs == 0:
        return Training({"steps": 0, "seconds": 0.0, "measured": "nothing: no epoch was asked for"}, {}, 0.0)
    progress, stopping = progress or Progress(quiet=True), option(EarlyStopping, early_stopping, "early_stopping")
    task, notes = _task(model, objective, mask, whole_words, seed), []
    found = read_texts(texts) if isinstance(texts, str | Path) else [text for text in texts if text.strip()]
    if len(found) < FEW_TEXTS:
        notes.append(f"only {len(found)} texts: below {FEW_TEXTS} pretraining may harm; compare with and without it")
        progress.say(f"  note: {notes[0]}")
    train, validation = _rows(model, found, task, min(max_length, model.max_length), packed, held_out)
    network, head = language_network(model, seed)
    groups = tuple(layer_groups(network))
    batches = epoch_batches(train.lengths, batch_size, seed, bucketing=not packed)
    steps, bfloat16 = epochs * len(batches), uses_bfloat16(precision)
    bound_kernel_caches()
    rates = tuple(layer_learning_rates(len(groups) - 2, learning_rate, layer_decay))
    alone = int(head_first * steps) if head == "new" else 0
    before = task.measure(network, validation)
    plan = Plan(
        groups=groups,
        timetable=HeadFirst(rates, SCHEDULES[schedule], warmup, steps, alone),
        objective=task,
        companions=Companions([KeptZeros(model.pruned)]),
        optimizer=Optimizer(),
        weight_decay=weight_decay,
        evaluate_at=evaluation_steps(len(batches), epochs, evaluations_per_epoch),
        steps=steps,
        judge=Judge(task.metric, task.metric in task.lower_is_better),
        patience=stopping.patience if stopping else None,
        average=None,
        dimensions=_dimensions(network, model, task),
    )
    with training_folder(workspace) as folder:
        loop = Loop(
            folder=folder,
            batches=batches,
            epochs=epochs,
            batch_size=batch_size,
            max_gradient_norm=max_gradient_norm,
            bfloat16=bfloat16,
            seed=seed,
            save_every_seconds=save_every_seconds,
            progress=progress,
            title="pretraining",
        )
        training = train_network(
            network,
            plan,
            loop,
            train=train,
            evaluator=lambda: task.measure(network, validation),
            collate=lambda rows: task.collate(rows, batches.epoch),
        )
    model.network.cpu().eval()
    facts = {
        "objective": task.kind,
        "head": head,
        "texts": len(found),
        "tokens": len(train.ids),
        "before": before,
        "after": task.measure(network, validation),
    }
    return dataclasses.replace(training, facts=facts | training.facts | ({"notes": notes} if notes else {}))


def _task(model: Model, objective: str, mask: float, whole_words: bool, seed: int) -> Restoring:
    words = Words.of(model.tokenizer)
    kind: Kind = kind_for(objective, model.anatomy.family.kind, words)
    two_segments = "token_type_ids" in model.tokenizer.model_input_names
    return Restoring(
        kind, words, mask, whole_words and kind == "masked", seed, model.tokenizer.pad_token_id, two_segments
    )


def _rows(
    model: Model, texts: Sequence[str], task: Restoring, length: int, packed: bool, held_out: float
) -> tuple[Packed, Packed]:
    """Rows to train on, and rows of the texts that are held out; DataError where there are none."""
    if len(texts) < 2:
        raise DataError(f"pretrain.texts: {len(texts)} texts; give at least two, one of which is held out.")
    if task.room(length) < 2:
        raise DataError(f"pretrain.max_length: {length} leaves no room for two tokens of a text. Give more.")
    order = np.random.default_rng(task.seed).permutation(len(texts))
    count = min(max(1, round(held_out * len(texts))), len(texts) - 1)
    parts = (np.sort(order[count:]), np.sort(order[:count]))
    room = _most(task, task.room(length))
    train, validation = (
        pack([texts[index] for index in part], model.tokenizer, room, packed, task.whole_words, task.shortest)
        for part in parts
    )
    for part, rows in {"to train on": train, "held out": validation}.items():
        if not len(rows):
            raise DataError(
                f"pretrain.texts: those {part} have fewer than {task.shortest} tokens each. Give longer ones, or "
                "packed: true."
            )
    return train, validation


def _most(task: Restoring, room: int) -> int:
    """No row may need more sentinels than there are: a span of three tokens takes one."""
    spans = len(task.words.sentinels) - 1
    return min(room, max(2, int(3 * spans / task.share))) if task.kind == "spans" else room


def _dimensions(network: Any, model: Model, task: Restoring) -> Any:
    """What a step costs; a masked language model's head is asked at the masked tokens alone."""
    found = Model(network, model.tokenizer, model.task).dimensions
    share = task.share if task.kind == "masked" else 1.0
    return dataclasses.replace(found, projection_parameters=int(found.projection_parameters * share))


@dataclass(frozen=True)
class HeadFirst:
    """A new head trains alone for `alone` of `steps` steps, then everything; one schedule for all."""

    peaks: tuple[float, ...]
    schedule: Schedule
    warmup: float
    steps: int
    alone: int

    def trains(self, step: int) -> tuple[bool, ...]:
        return (*[step >= self.alone] * (len(self.peaks) - 1), True)

    def multiplier(self, step: int, group: int) -> float:
        return self.schedule(step, self.steps, self.warmup)
