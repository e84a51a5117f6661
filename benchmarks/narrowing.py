"""Narrow a fine-tuned MiniLM to half and to a third of its blocks' multiply-accumulates on SST-2, without training.

`python benchmarks/narrowing.py --data FOLDER --work FOLDER [--seeds 3] [--epochs 2] [--ways …]`

FOLDER holds sst2/{train,dev,test}.tsv and sst2_glue/train.tsv.gz. The dense model is fine-tuned once into WORK and
reused. Every row adds one thing to the one above it; accuracy is measured on the 2,693 dev and test sentences, for
several draws of 1,024 calibration rows. Speed is ONNX Runtime's, dense and narrow in turns, batches of 32 sentences.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import random
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import keep, table

from moss_rlhf import finetune, load, narrow, save
from moss_rlhf.evaluation import measure_speed, speed_batches
from moss_rlhf.exporting import export_onnx
from moss_rlhf.model.cost import block_macs
from moss_rlhf.model.runtime import OnnxRuntime
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.optimization.unit_scores import fisher_score, groups_of, mask_gradients
from moss_rlhf.optimization.width_allocation import keep_highest, rearrange
from moss_rlhf.optimization.width_plan import budgeted_plan, uniform_plan
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.tasks.batching import padding_of
from moss_rlhf.tasks.loading import encoded

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ("negative", "positive")
ROWS = 1024
PHRASES = 13_000  # of GLUE's, beside the 6,920 whole sentences
QUIET = Progress(quiet=True)
ASKED = {0.5: "≥ 98.5 %", 0.65: "≥ 96 %"}
NAMES = {0.5: "50 % of the MACs", 0.65: "35 % of the MACs"}


# --- data and the dense model --------------------------------------------------------------------------------------


def read_rows(lines) -> list[dict[str, str]]:
    cells = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return [{"text": row[0].strip(), "label": LABELS[int(row[1])]} for row in cells if row[1] in ("0", "1")]


def sentences(data: Path) -> dict[str, list[dict[str, str]]]:
    """train (sentences and longer phrases, none of the held-out texts), dev, test."""
    split = {}
    for name in ("train", "dev", "test"):
        with (data / "sst2" / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
            split[name] = read_rows(file)
    with gzip.open(data / "sst2_glue" / "train.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        phrases = read_rows(file)
    random.Random(0).shuffle(phrases)  # noqa: S311
    held_out = {row["text"] for row in split["dev"] + split["test"]}
    longer = [row for row in phrases if row["text"] not in held_out and len(row["text"].split()) >= 4]
    split["train"] += longer[:PHRASES]
    random.Random(1).shuffle(split["train"])  # noqa: S311
    return split


def dense_model(work: Path, split):
    place = work / "dense"
    if not place.exists():
        torch.manual_seed(0)
        model = load(MODEL, labels=LABELS)
        finetune(
            model,
            split["train"],
            split["dev"],
            epochs=3,
            learning_rate=1e-4,
            layer_decay=0.9,
            evaluations_per_epoch=2,
        )
        save(model, place)
    return load(place)


class Judge:
    """Accuracy on the held-out sentences, as a share of the dense model's."""

    def __init__(self, dense, held_out) -> None:
        sample = calibration_rows(held_out, len(held_out), 0)
        self.batches = list(labelled_batches(dense, sample))
        self.labels = torch.cat([labels for _, labels in self.batches])
        self.answers = self._answers(dense)
        self.dense = float((self.answers == self.labels).float().mean())

    def _answers(self, model):
        model.network.eval()
        with torch.inference_mode():
            return torch.cat([model.network(**inputs).logits.argmax(dim=1) for inputs, _ in self.batches])

    def kept(self, model) -> float:
        return float((self._answers(model) == self.labels).float().mean()) / self.dense


# --- the ways ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draw:
    """One draw of calibration rows: the encoded training rows, its seed, the dense masks' gradients on it."""

    train: Any
    seed: int
    gradients: Mapping[str, torch.Tensor]


def drawn(dense, train, seed: int) -> Draw:
    batches = list(labelled_batches(dense, calibration_rows(train, ROWS, seed)))
    return Draw(train, seed, mask_gradients(dense, batches, QUIET))


def by_fisher(model, share: float, draw: Draw, *, uniform: bool = False, rearranged: bool = False) -> None:
    """The parts of `narrow` alone: no repair."""
    scores = {name: fisher_score(values) for name, values in draw.gradients.items()}
    length = float(np.mean(draw.train["length"]))
    if uniform:
        plan = uniform_plan(model, share, share, 8)
    else:
        plan = budgeted_plan(model, "macs", share, multiple_of=8, length=length)
    groups = groups_of(model.anatomy)
    for (part,), width in zip(groups, plan.widths(groups, scores, 1.0), strict=True):
        kept = keep_highest(scores[part.name], width)
        part.keep(rearrange(draw.gradients[part.name], kept) if rearranged else kept)


def by_narrow(model, share: float, draw: Draw, *, steps: int = 1) -> None:
    narrow(model, draw.train, macs=share, rows=ROWS, steps=steps, seed=draw.seed)


WAYS = {
    "Fisher, uniform": partial(by_fisher, uniform=True),
    "Fisher, widths where they cost least": by_fisher,
    "+ rearrangement": partial(by_fisher, rearranged=True),
    "+ least squares (`macs`)": by_narrow,
    "+ `steps: 2`": partial(by_narrow, steps=2),
}
BEST = "+ least squares (`macs`)"


def macs_share(model, dense, length: float) -> float:
    old, new = dense.dimensions, model.dimensions
    return sum(block_macs(shape, new, length) for shape in new.blocks) / sum(
        block_macs(shape, old, length) for shape in old.blocks
    )


# --- the table -----------------------------------------------------------------------------------------------------


def measure_ways(dense, train, judge: Judge, seeds: int, ways: list[str]) -> tuple[list[tuple[str, str, str]], dict]:
    length, rows, narrowed = float(np.mean(train["length"])), [], {}
    draws = [drawn(dense, train, seed) for seed in range(seeds)]
    for share, name in NAMES.items():
        for way, cut in ((way, WAYS[way]) for way in ways):
            kept, seconds = [], []
            for seed, draw in enumerate(draws):
                model, started = copy.deepcopy(dense), time.perf_counter()
                cut(model, share, draw)
                seconds.append(time.perf_counter() - started)
                kept.append(judge.kept(model))
                print(name, way, seed, f"{kept[-1]:.4f} of accuracy, {seconds[-1]:.0f} s", flush=True)
                if seed == 0:
                    narrowed[share, way] = model
            spread = f"{statistics.mean(kept):.2%} ({min(kept):.2%} to {max(kept):.2%})"
            spread += f", {statistics.mean(seconds):.0f} s" if "least squares" in way or "steps" in way else ""
            macs = macs_share(narrowed[share, way], dense, length)
            asked = ASKED[share] if way == BEST else ""
            rows.append((f"{name}: {way}", f"{spread}, {macs:.3f}× MACs", asked))
    return rows, narrowed


def speed_row(dense, narrowed, held_out, name: str) -> tuple[str, str, str]:
    padding = padding_of(dense.tokenizer)
    columns = [column for column in padding if column != "attention_mask"]
    rows = [{column: row[column] for column in columns} for row in held_out]
    batches = speed_batches(rows, [32], padding, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        runtimes = {}
        for label, model in (("dense", dense), ("narrow", narrowed)):
            export_onnx(model, Path(folder) / label, batches[32][:2])
            runtimes[label] = OnnxRuntime(Path(folder) / label / "model.onnx")
        speed = measure_speed(runtimes, batches, progress=QUIET, rounds=9)
    ratio = speed["narrow"]["throughput"]["32"] / speed["dense"]["throughput"]["32"]
    return f"{name}: throughput, batch 32, ONNX Runtime", f"{ratio:.2f}×", "≥ 1.6×" if "50" in name else ""


def distilled_row(dense, narrowed, split, judge: Judge, epochs: int) -> tuple[str, str, str]:
    model, started = copy.deepcopy(narrowed), time.perf_counter()
    finetune(model, split["train"], split["dev"], epochs=epochs, learning_rate=1e-4, teacher=dense)
    seconds = time.perf_counter() - started
    return (
        f"50 % of the MACs, then {epochs} epochs with distillation",
        f"{judge.kept(model):.2%}, {seconds:.0f} s",
        "≥ 99 %",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help=f"{BEST!r} must be one")
    options = parser.parse_args()
    quiet_libraries()
    split = sentences(options.data)
    dense = dense_model(options.work, split)
    train, held_out = encoded(dense, split["train"]), encoded(dense, split["dev"] + split["test"])
    judge = Judge(dense, held_out)
    rows, narrowed = measure_ways(dense, train, judge, options.seeds, options.ways)
    for share, name in NAMES.items():
        rows.append(speed_row(dense, narrowed[share, BEST], held_out, name))
    if options.epochs:
        rows.append(distilled_row(dense, narrowed[0.5, BEST], split, judge, options.epochs))
    rows.insert(0, ("dense MiniLM, accuracy", f"{judge.dense:.4f}", ""))
    keep("narrowing", table("Narrowing a fine-tuned MiniLM, SST-2: share of the dense accuracy kept", rows))


if __name__ == "__main__":
    main()
