"""Examples per second with 4 of 6 blocks frozen: the Hugging Face Trainer's defaults, ours, and ours with the cache.

`python benchmarks/prefix_cache.py [TRAIN_TSV] [ROWS] [ROUNDS]`; the three take turns: a noisy machine slows all.
Theirs trains every layer (random order, dynamic padding, float32): what a user would do otherwise. Ours trains the head
and the two highest blocks, in length buckets; with the cache, what the four lower ones give is read from disk. Filling
it is timed by itself, and stated beside the rate that each number of epochs comes to with it.
"""

from __future__ import annotations

import statistics
import sys

import torch
from common import keep, table
from finetuning_speed import BATCH, fresh_model, read_rows, theirs

from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.running import uses_bfloat16
from moss_rlhf.model.runtime import usable_cores
from moss_rlhf.progress import quiet_libraries
from moss_rlhf.tasks.loading import encoded

TRAINED = ["head", "block.5", "block.4"]


def ours(rows, cache) -> tuple[float, float, float]:
    """(examples a second of the training steps, seconds to fill the cache, its bytes)."""
    model = fresh_model()
    facts = finetune(
        model,
        encoded(model, rows, 128),
        encoded(model, rows[:2], 128),
        phases=[{"train": TRAINED, "epochs": 1}],
        batch_size=BATCH,
        cache=cache,
    ).facts
    filling = facts.get("cache_seconds", 0.0)
    return len(rows) / (facts["seconds"] - filling), filling, facts.get("cache_bytes", 0)


def main(path: str = "../shared/data/sst2/train.tsv", rows: str = "960", rounds: str = "3") -> None:
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    data = read_rows(path, int(rows))
    found = [(theirs(data), ours(data, "off"), ours(data, {"epochs": 1, "required": True})) for _ in range(int(rounds))]
    default, plain, stored = ([turn[kind] for turn in found] for kind in range(3))
    keep("prefix_cache", table(f"The cached prefix, {len(data)} rows of {path.rsplit('/', 2)[-2]}, batch {BATCH}", [
        ("Hugging Face Trainer, its defaults, all layers: examples/s", f"{statistics.median(default):.1f}", ""),
        (f"ours, 4 of 6 blocks frozen ({_precision()}): examples/s", _rate([turn[0] for turn in plain]), ""),
        ("ours, the same with the cache: examples/s", _rate([turn[0] for turn in stored]), ""),
        ("filling the cache: seconds", f"{statistics.median(turn[1] for turn in stored):.1f}", ""),
        ("the cache on disk: MB", f"{stored[0][2] / 1e6:.1f}", ""),
        ("ratio, ours uncached to theirs", _ratio([turn[0] for turn in plain], default), ""),
        ("ratio, ours cached to theirs", _ratio([turn[0] for turn in stored], default), "≥ 8×"),
        *(
            (f"the same, filling counted, {epochs} epochs", _ratio(_filled(stored, len(data), epochs), default), "")
            for epochs in (3, 10)
        ),
    ]))  # fmt: skip


def _precision() -> str:
    return "bfloat16" if uses_bfloat16("auto") else "float32: this processor has no bfloat16"


def _rate(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}"


def _filled(turns: list[tuple[float, float, float]], rows: int, epochs: int) -> list[float]:
    """The rates with the filling spread over so many epochs."""
    return [epochs * rows / (epochs * rows / rate + filling) for rate, filling, _ in turns]


def _ratio(mine: list[float], others: list[float]) -> str:
    ratios = [one / other for one, other in zip(mine, others, strict=True)]
    return f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main(*sys.argv[1:])
