"""What each way of taking layers out costs: accuracy on the test rows, without training and after a short recovery.

`python benchmarks/shortening.py --model CHECKPOINT --data FOLDER`: a fine-tuned classifier, and train.tsv and test.tsv
of lines `text<tab>class id`. The calibration rows are drawn anew by each seed; nothing is chosen by the test rows.
"""

from __future__ import annotations

import argparse
import statistics
import time
from copy import deepcopy
from pathlib import Path
from typing import get_args

import torch
from common import keep, table
from finetuning_speed import read_rows

from moss_rlhf import load
from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.running import uses_bfloat16
from moss_rlhf.model.runtime import usable_cores
from moss_rlhf.optimization.calibration import labelled_batches
from moss_rlhf.optimization.shorten import How, Score, shorten
from moss_rlhf.progress import quiet_libraries
from moss_rlhf.tasks.batching import by_length
from moss_rlhf.tasks.loading import encoded

RECOVERY = {"epochs": 1, "learning_rate": 5e-5, "distill": {"temperature": 2.0, "weight": 0.7}}


def accuracy(model, rows) -> float:
    """In bfloat16 where the processor has it: a third of the time."""
    model.network.eval()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=uses_bfloat16("auto")):
        right = sum(
            int((model.network(**inputs).logits.argmax(dim=1) == labels).sum())
            for inputs, labels in labelled_batches(model, rows)
        )
    return right / len(rows)


def ways() -> list[tuple[str, str]]:
    """(score, how), but for auto, which comes with the recovery."""
    return [(score, how) for score in get_args(Score) for how in get_args(How) if how != "auto"]


def measure(dense, train, test, remove: int, *, seeds: int, rows: int) -> list[tuple[str, str, str]]:
    whole, lines = accuracy(dense, test), []
    known: dict[str, float] = {}  # by what was done: several seeds and scores find the same
    for score, how in ways():
        found, seconds = [], []
        for seed in range(seeds):
            model, started = deepcopy(dense), time.perf_counter()
            facts = shorten(model, train, remove=remove, how=how, score=score, rows=rows, seed=seed)
            seconds.append(time.perf_counter() - started)
            key = f"{how}, {facts['dropped']}, {facts.get('merged')}, {facts.get('fit_error')}"
            known[key] = known[key] if key in known else accuracy(model, test)
            found.append(known[key])
        lines.append(
            (
                f"{remove} of {len(dense.anatomy.blocks)}: {how}, {score}",
                f"{statistics.mean(found):.4f} ({min(found):.4f} to {max(found):.4f})",
                f"{statistics.mean(found) / whole:.1%} of dense; {statistics.mean(seconds):.1f} s",
            )
        )
        print(" | ".join(lines[-1]), flush=True)
    return lines


def recover(dense, train, test, remove: int, *, rows: int, count: int) -> tuple[str, str, str]:
    """One epoch with the dense model as teacher, after `auto`."""
    model = deepcopy(dense)
    facts = shorten(model, train, remove=remove, how="auto", rows=rows)
    before, started = accuracy(model, test), time.perf_counter()
    some = train.shuffle(seed=0).select(range(min(count, len(train))))
    held = train.select(range(64))
    finetune(model, some, held, teacher=dense, seed=0, **RECOVERY)
    after = accuracy(model, test)
    losses = ", ".join(f"{how} {loss:.3f}" for how, loss in facts["candidates"].items())
    print(f"{remove}: held-out losses: {losses}; {before:.4f} → {after:.4f}", flush=True)
    return (
        f"{remove} of {len(dense.anatomy.blocks)}: auto ({facts['how']}), then 1 epoch on {len(some)} rows, distilled",
        f"{before:.4f} → {after:.4f}",
        f"{after / accuracy(dense, test):.1%} of dense; {time.perf_counter() - started:.0f} s",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--seeds", type=int, default=3, help="0: only the recovery")
    parser.add_argument("--rows", type=int, default=256, help="calibration rows")
    parser.add_argument("--remove", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recover-rows", type=int, default=2000, help="0: no recovery")
    parser.add_argument("--name", default="shortening", help="of the results' file")
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    dense = load(given.model)
    train, test = (encoded(dense, read_rows(given.data / name, 10**6), 128) for name in ("train.tsv", "test.tsv"))
    test = test.select(by_length(test["length"]))
    lines = [("dense", f"{accuracy(dense, test):.4f}", "")]
    for remove in given.remove if given.seeds else []:
        lines += measure(dense, train, test, remove, seeds=given.seeds, rows=given.rows)
    if given.recover_rows:
        lines += [
            recover(dense, train, test, remove, rows=given.rows, count=given.recover_rows) for remove in given.remove
        ]
    title = f"Layers taken out of a fine-tuned {dense.network.config.model_type} of {len(dense.anatomy.blocks)} layers"
    header = ("what", f"accuracy on {len(test)} test rows, mean (lowest to highest) of {given.seeds} seeds", "cost")
    keep(given.name, table(f"{title}, {given.rows} calibration rows", lines, header))


if __name__ == "__main__":
    main()
