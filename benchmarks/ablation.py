"""Each trick of fine-tuning alone on SST-2: what it gains in accuracy and what it costs in time, over several seeds.

`python benchmarks/ablation.py --data FOLDER --work FOLDER [--rows 8000] [--epochs 2] [--seeds 3] [--workers 1]`
and, of the fine-tuning that follows a compression, the same with `--study recovery`.

FOLDER holds sst2/{dev,test}.tsv and sst2_glue/train.tsv.gz. Every training starts from the same pretrained MiniLM and
differs from the plain one in the fields that the table names. The best of its evaluations on dev (872 sentences) is
kept; accuracy is that on the 1,821 test sentences, in float32. A gain is the mean of the differences from the plain
training of the same seed, with Student's interval over the seeds; a time is all of the run's seconds, those of reading,
cleaning and pretraining included, divided by the plain run's. With several workers all runs slow one another, and times
are rough. WORK keeps what is measured, a line a run: a stopped benchmark goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import keep, table

from moss_rlhf.measuring import same_threads
from moss_rlhf.model.device import on_accelerator
from moss_rlhf.model.runtime import TorchRuntime
from moss_rlhf.pipeline import on_validation
from moss_rlhf.preparing import prepare
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.recipe import make_recipe, with_values
from moss_rlhf.rundir import open_run
from moss_rlhf.searching import mean_interval
from moss_rlhf.tasks import TASKS

QUIET = Progress(quiet=True)
PLAIN = "plain"
FINETUNE, DATA, RECOVERY = "stages.0.finetune.", "data.", "stages.3.finetune."


def finetuned(**options: Any) -> dict[str, Any]:
    return {FINETUNE + name: value for name, value in options.items()}


TRICKS: Mapping[str, dict[str, Any]] = {
    PLAIN: {},
    "learning_rate: 1e-4": finetuned(learning_rate=1e-4),
    "learning_rate: 2e-4": finetuned(learning_rate=2e-4),
    "layer_decay: 0.9": finetuned(layer_decay=0.9),
    "learning_rate: 1e-4, layer_decay: 0.9": finetuned(learning_rate=1e-4, layer_decay=0.9),
    "unfreeze: gradual": finetuned(unfreeze="gradual"),
    "unfreeze: head_first": finetuned(unfreeze="head_first"),
    "reinitialise: 1": finetuned(reinitialise=1),
    "schedule: cosine": finetuned(schedule="cosine"),
    "schedule: one_cycle": finetuned(schedule="one_cycle"),
    "schedule: slanted_triangular": finetuned(schedule="slanted_triangular"),
    "schedule: warmup_stable_decay": finetuned(schedule="warmup_stable_decay"),
    "optimizer: adam": finetuned(optimizer="adam"),
    "optimizer: adafactor": finetuned(optimizer="adafactor"),
    "optimizer: sgd, learning_rate: 1e-2": finetuned(optimizer="sgd", learning_rate=1e-2),
    "loss: {label_smoothing: 0.1}": finetuned(loss={"label_smoothing": 0.1}),
    "loss: {gamma: 2} (focal)": finetuned(loss={"gamma": 2.0}),
    "loss: {r_drop: 1}": finetuned(loss={"r_drop": 1.0}),
    "l2_start: 0.01": finetuned(l2_start=0.01),
    "l1: 1e-6": finetuned(l1=1e-6),
    "mixup: 0.2": finetuned(mixup=0.2),
    "adapter: lora, learning_rate: 5e-4": finetuned(adapter={"kind": "lora"}, learning_rate=5e-4),
    "adapter: dora, learning_rate: 5e-4": finetuned(adapter={"kind": "dora"}, learning_rate=5e-4),
    "average: {best: 3}, 4 looks an epoch": finetuned(average={"best": 3}, evaluations_per_epoch=4),
    "4 looks an epoch": finetuned(evaluations_per_epoch=4),
    "movement: {sparsity: 0.5}": finetuned(movement={"sparsity": 0.5}),
    "quantization_aware: {scheme: int8}": finetuned(quantization_aware={"scheme": "int8"}),
    "length_bucketing: false": finetuned(length_bucketing=False),
    "precision: float32": finetuned(precision="float32"),
    "augment: swap, delete, punctuation 0.1": {
        DATA + "augment": {"copies": 1, "swap": 0.1, "delete": 0.1, "punctuation": 0.1}
    },
    "augment: typo 0.1": {DATA + "augment": {"copies": 1, "typo": 0.1}},
    "clean: {near_duplicates: drop}": {DATA + "clean": {"near_duplicates": "drop"}},
    "clean: {label_errors: drop}": {DATA + "clean": {"label_errors": "drop"}},
    "balance: oversample": {DATA + "balance": "oversample"},
}
PRETRAINED = "pretrain, 3 epochs of the task's texts, before it"
COPIES = {"copies": 1, "swap": 0.1, "delete": 0.1, "punctuation": 0.1, "use": "distill"}
RECOVERIES: Mapping[str, dict[str, Any]] = {
    PLAIN: {},  # the parent's logits teach
    "no teacher": {RECOVERY + "distill": "none"},
    "labels and teacher half and half": {RECOVERY + "distill.weight": 0.5},
    "hidden states too": {RECOVERY + "distill.hidden": 1.0},
    "attention relations too": {RECOVERY + "distill.attention": 1.0},
    "augmented copies for the student": {DATA + "augment": COPIES},
    "twice the epochs": {RECOVERY + "epochs": 2},
    "layers: by_damage": {RECOVERY + "layers": "by_damage"},
    "layer_decay: 0.9": {RECOVERY + "layer_decay": 0.9},
}
STUDIES = {"finetuning": [*TRICKS, PRETRAINED], "recovery": list(RECOVERIES)}


def recipe_of(options: argparse.Namespace, trick: str, seed: int, output: str) -> Any:
    glue, folder = options.data / "sst2_glue" / "train.tsv.gz", options.data / "sst2"
    layout = {"header": False, "columns": {"text": 0, "label": 1}}
    plain = make_recipe(
        {
            "task": "text-classification",
            "model": "sentence-transformers/all-MiniLM-L6-v2",
            "data": {
                "train": {"file": str(glue), "columns": {"text": "sentence", "label": "label"}},
                "validation": {"file": str(folder / "dev.tsv")} | layout,
                "test": {"file": str(folder / "test.tsv")} | layout,
                "limit": {"train": options.rows},
                "max_length": 64,
            },
            "stages": stages_of(options),
            "seed": seed,
            "output": output,
        }
    )
    if trick == PRETRAINED:
        return with_values(
            plain,
            {
                "stages": [
                    {"pretrain": {"epochs": 3, "learning_rate": 2e-4, "max_length": 128}},
                    {"finetune": {"epochs": options.epochs}},
                ]
            },
        )
    return with_values(plain, (TRICKS if options.study == "finetuning" else RECOVERIES)[trick])


def stages_of(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A fine-tuning; for the study of recovery half of the heads and neurons go after it, and it is taught again."""
    if options.study == "finetuning":
        return [{"finetune": {"epochs": options.epochs}}]
    recovery = {"epochs": options.epochs, "learning_rate": 1e-4, "distill": {"teacher": "parent", "weight": 0.9}}
    narrow = {"heads": 0.5, "feed_forward": 0.5, "score": "sensitivity"}
    first = {"epochs": options.epochs, "learning_rate": 1e-4}
    return [{"finetune": first}, {"sensitivity": {}}, {"narrow": narrow}, {"finetune": recovery}]


def measured(options: argparse.Namespace, trick: str, seed: int) -> dict[str, Any]:
    """One run: accuracy on test of what its best look at dev left, and its seconds."""
    quiet_libraries()
    with tempfile.TemporaryDirectory() as output:
        recipe, started = recipe_of(options, trick, seed, output), time.perf_counter()
        on_validation(recipe, "accuracy", QUIET)
        seconds = time.perf_counter() - started
        with open_run(Path(output)) as place:
            session = prepare(recipe, place, QUIET, same_threads())
            model, last = session.model_after(len(recipe.stages)), len(recipe.stages)
            rows, task = session.rows_after(last).evaluation, TASKS[recipe.task]
            with on_accelerator(model.network):
                logits = task.predict(TorchRuntime(model.network), rows, model.tokenizer)
    accuracy = float((task.answers(logits) == task.labels(rows)).mean())
    return {"trick": trick, "seed": seed, "accuracy": accuracy, "seconds": seconds}


def measure_all(options: argparse.Namespace, tricks: list[str]) -> list[dict[str, Any]]:
    """Every trick with every seed, one seed after the other; those that WORK holds already are read."""
    options.work.mkdir(parents=True, exist_ok=True)
    file = options.work / f"{options.study}-{options.rows}-{options.epochs}.jsonl"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    done = {(one["trick"], one["seed"]) for one in found}
    jobs = [(trick, seed) for seed in range(options.seeds) for trick in tricks if (trick, seed) not in done]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(measured, options, trick, seed) for trick, seed in jobs]
        for ended in as_completed(running):
            if ended.exception():
                pool.shutdown(cancel_futures=True)
            found.append(ended.result())
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(found[-1]) + "\n")
            print(found[-1], flush=True)
    return found


def row_of(trick: str, found: list[dict[str, Any]]) -> tuple[str, str, str]:
    own = {one["seed"]: one for one in found if one["trick"] == trick}
    plain = {one["seed"]: one for one in found if one["trick"] == PLAIN}
    seeds = sorted(own.keys() & plain.keys())
    times = statistics.median(own[seed]["seconds"] / plain[seed]["seconds"] for seed in seeds)
    mean = statistics.fmean(own[seed]["accuracy"] for seed in seeds)
    if trick == PLAIN:
        return trick, f"{mean:.4f}", f"1 ({statistics.median(one['seconds'] for one in plain.values()):.0f} s)"
    gain = mean_interval([own[seed]["accuracy"] - plain[seed]["accuracy"] for seed in seeds])
    between = f" ({gain['low']:+.4f} to {gain['high']:+.4f})" if gain["low"] is not None else ""
    return trick, f"{mean:.4f}, {gain['mean']:+.4f}{between}", f"{times:.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where what is measured is kept")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--study", choices=list(STUDIES), default="finetuning")
    parser.add_argument("--only", nargs="+")
    options = parser.parse_args()
    tricks = options.only or STUDIES[options.study]
    found = measure_all(options, tricks)
    counted = [trick for trick in tricks if any(one["trick"] == trick for one in found)]
    title = (
        f"Each trick of {options.study} alone, SST-2, {options.rows:,} phrases, {options.epochs} epochs, "
        f"{options.seeds} seeds, {options.workers} runs at once"
    )
    rows = [row_of(trick, found) for trick in counted]
    name = "ablation" if options.study == "finetuning" else f"ablation-{options.study}"
    keep(name, table(title, rows, ("trick", "test accuracy, gain (95 %)", "time of the run")))


if __name__ == "__main__":
    main()
