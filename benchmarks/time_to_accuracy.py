"""Seconds of training to the accuracy that the Hugging Face Trainer's default run ends with.

`python benchmarks/time_to_accuracy.py --data FOLDER --work FOLDER [--only sst2 imdb] [--seeds 0] [--short imdb]`

Theirs: 3 epochs of AdamW at 5e-5 falling linearly, random order, dynamic padding, float32, each text's first tokens,
batches of 32; nothing but its training steps is timed. Ours: the options below, its looks at validation timed too. Both
are complete runs, which then answer the same test texts, so that the accuracies can be compared in pairs: ours has
arrived where it ends no lower. FOLDER holds sst2_glue/train.tsv.gz,
sst2/{dev,test}.tsv and imdb/{train,test}.tsv.gz.
--short: the default's accuracy from our own engine in bfloat16 with the same order, schedule and epochs, and its time
from the Trainer's rate on SAMPLE rows, instead of hours of it.
WORK keeps what each training answered and took: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, table
from finetuning_speed import BATCH, LABELS, MODEL, Clock, read_rows, theirs
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from moss_rlhf import load, save
from moss_rlhf.evaluation import gain_of
from moss_rlhf.evaluation.comparison import ClassAnswers
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.running import uses_bfloat16
from moss_rlhf.model.cutting import Cut
from moss_rlhf.model.runtime import TorchRuntime, usable_cores
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded

SAMPLE = {128: 960, 256: 192}  # rows, by their longest
DEFAULTS = {"epochs": 3, "length_bucketing": False, "warmup": 0.0, "learning_rate": 5e-5}


@dataclass(frozen=True)
class Set:
    """Which rows, how long, how texts are cut by us, and how we train."""

    train: str
    rows: int
    validation: str
    test: str
    test_rows: int
    longest: int
    keep: str
    options: Mapping[str, Any]


SETS = {
    "sst2": Set(
        "sst2_glue/train.tsv.gz", 20_000, "sst2/dev.tsv", "sst2/test.tsv", 10**6, 128, "head",
        {"epochs": 2, "learning_rate": 2e-4, "layer_decay": 0.9},
    ),
    "imdb": Set(
        "imdb/train.tsv.gz", 5_000, "imdb/train.tsv.gz", "imdb/test.tsv.gz", 5_000, 256, "head+tail",
        {"epochs": 1, "learning_rate": 2e-4, "layer_decay": 0.9},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    answers: ClassAnswers
    seconds: float


def train_rows(data: Path, given: Set) -> list[dict]:
    return read_rows(data / given.train, given.rows)


def held_out(data: Path, given: Set) -> list[dict]:
    """Rows to look at while training: a file of its own, or 500 of those that are not trained on."""
    if given.validation != given.train:
        return read_rows(data / given.validation, 10**6)
    used = {row["text"] for row in train_rows(data, given)}
    left = [row for row in read_rows(data / given.train, 10**6) if row["text"] not in used]
    return left[:: len(left) // 500][:500]


def fresh(seed: int, given: Set, keep_tokens: str) -> Any:
    torch.manual_seed(seed)
    model = load(MODEL, labels=LABELS)
    model.cut = Cut(keep_tokens, given.longest)
    return model


def by_trainer(model: Any, rows: list[dict], seed: int) -> float:
    """The Trainer's defaults; returns the seconds of its steps."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        data, collate = encoded(model, rows).remove_columns(["length"]), DataCollatorWithPadding(model.tokenizer)
        Trainer(model.network, arguments, data_collator=collate, train_dataset=data, callbacks=[clock]).train()
    return clock.seconds


def default_run(data: Path, given: Set, seed: int, short: bool) -> tuple[Any, float]:
    rows, model = train_rows(data, given), fresh(seed, given, "head")
    if not short:
        return model, by_trainer(model, rows, seed)
    finetune(model, encoded(model, rows), encoded(model, rows[:2]), batch_size=BATCH, seed=seed, **DEFAULTS)
    count = SAMPLE[given.longest]
    rate = theirs(rows[:: len(rows) // count][:count], given.longest)
    return model, 3 * len(rows) / rate


def our_run(data: Path, given: Set, seed: int) -> tuple[Any, float]:
    rows, look, model = train_rows(data, given), held_out(data, given), fresh(seed, given, given.keep)
    options = {"batch_size": BATCH, "seed": seed, "progress": Progress()} | dict(given.options)
    training = finetune(model, encoded(model, rows), encoded(model, look), **options)
    return model, training.facts["seconds"]


def answered(model: Any, data: Path, given: Set) -> ClassAnswers:
    """All test rows, in bfloat16 where the processor has it: the same for both sides, at a third of the time."""
    texts = read_rows(data / given.test, given.test_rows)
    rows, labels = encoded(model, texts), [LABELS.index(text["label"]) for text in texts]
    model.network.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16("auto")):
        logits = TASKS[model.task].predict(TorchRuntime(model.network), rows, model.tokenizer)
    return ClassAnswers(logits, logits.argmax(axis=1), np.array(labels))


def kept_run(place: Path, make: Any, data: Path, given: Set) -> Run:
    """What a training answered and took, from WORK where it stands there."""
    file = place.with_suffix(".npz")
    if not file.exists():
        model, seconds = make()
        save(model, place)
        found = answered(model, data, given)
        np.savez(file, logits=found.logits, labels=found.labels, seconds=seconds)
    with np.load(file, allow_pickle=False) as stored:
        logits, labels = stored["logits"], stored["labels"]
        return Run(ClassAnswers(logits, logits.argmax(axis=1), labels), float(stored["seconds"]))


def pair(name: str, seed: int, options: argparse.Namespace) -> tuple[Run, Run]:
    """The default's run and ours, with one seed."""
    given, data, place = SETS[name], options.data, options.work / f"{name}-{seed}"
    theirs_made = partial(default_run, data, given, seed, name in options.short)
    default = kept_run(Path(f"{place}-default"), theirs_made, data, given)
    ours = kept_run(Path(f"{place}-ours"), partial(our_run, data, given, seed), data, given)
    print(name, seed, [(accuracy(run), run.seconds) for run in (default, ours)], flush=True)
    return default, ours


def compared(name: str, options: argparse.Namespace) -> list[tuple[str, str, str]]:
    given, runs = SETS[name], [pair(name, seed, options) for seed in options.seeds]
    ratios = [ours.seconds / default.seconds for default, ours in runs]
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
    way = "the Trainer"
    if name in options.short:
        way = "accuracy: our engine, the same in bfloat16; seconds: by the Trainer's rate"
    title = f"{name}, {given.rows:,} rows"
    return [
        (f"{title}: the default, 3 epochs ({way})", *of_runs([default for default, _ in runs])),
        (f"{title}: ours, {described(given)}", *of_runs([ours for _, ours in runs])),
        (f"{title}: ours less the default", difference(runs), f"{statistics.median(ratios):.3f}×{spread}; asked ≤ 1/3"),
    ]


def accuracy(run: Run) -> float:
    return float((run.answers.ids == run.answers.labels).mean())


def of_runs(runs: list[Run]) -> tuple[str, str]:
    found = [accuracy(run) for run in runs]
    return f"{statistics.fmean(found):.4f}", f"{statistics.median(run.seconds for run in runs):.0f} s"


def described(given: Set) -> str:
    words = ", ".join(f"{name} {value}" for name, value in given.options.items())
    return f"{words}, {given.keep}, bfloat16" if uses_bfloat16("auto") else f"{words}, {given.keep}"


def difference(rows: list[tuple[Run, Run]]) -> str:
    """Paired over the test texts, each seed by itself."""
    task, found = TASKS["text-classification"], []
    for default, ours in rows:
        gain = gain_of(task, default.answers, ours.answers, confidence=0.95, resamples=2000, seed=0)
        found.append(f"{gain['delta']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})")
    return "; ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=list(SETS), choices=list(SETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--short", nargs="*", default=[], choices=list(SETS))
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [row for name in options.only for row in compared(name, options)]
    title = f"Time to the default's accuracy, MiniLM, batch {BATCH}, {len(options.seeds)} seeds, {usable_cores()} cores"
    keep("time_to_accuracy", table(title, rows, ("what", "test accuracy", "seconds")))


if __name__ == "__main__":
    main()
