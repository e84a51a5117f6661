"""Examples per second of fine-tuning: ours against the Hugging Face Trainer with its defaults, all else equal.

`python benchmarks/finetuning_speed.py [TRAIN_TSV] [ROWS] [ROUNDS]`; they take turns: a noisy machine slows both.
Theirs: random order, dynamic padding, float32. Ours: length buckets, and bfloat16 where the processor has it.
"""

from __future__ import annotations

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import keep, table
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments

from moss_rlhf.finetuning import finetune
from moss_rlhf.finetuning.running import uses_bfloat16
from moss_rlhf.model.runtime import usable_cores
from moss_rlhf.progress import quiet_libraries
from moss_rlhf.tasks.loading import encoded, load

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ("negative", "positive")
BATCH = 32


def read_rows(path: str, most: int) -> list[dict]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        cells = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    stride = max(1, len(cells) // most)
    return [{"text": text, "label": LABELS[int(label)]} for text, label in cells[::stride][:most]]


def fresh_model():
    torch.manual_seed(0)
    return load(MODEL, labels=LABELS)


class Clock(TrainerCallback):
    """Seconds from the first step to the last."""

    def on_train_begin(self, *_, **__) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *_, **__) -> None:
        self.seconds = time.perf_counter() - self.started


def theirs(rows) -> float:
    model, clock = fresh_model(), Clock()
    data = encoded(model, rows, 128).remove_columns(["length"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        collate = DataCollatorWithPadding(model.tokenizer)
        Trainer(model.network, arguments, data_collator=collate, train_dataset=data, callbacks=[clock]).train()
    return len(rows) / clock.seconds


def ours(rows) -> float:
    model = fresh_model()
    training = finetune(model, encoded(model, rows, 128), encoded(model, rows[:2], 128), epochs=1, batch_size=BATCH)
    return len(rows) / training.facts["seconds"]


def main(path: str = "../shared/data/sst2/train.tsv", rows: str = "1600", rounds: str = "3") -> None:
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    data = read_rows(path, int(rows))
    pairs = [(theirs(data), ours(data)) for _ in range(int(rounds))]
    ratios = [mine / other for other, mine in pairs]
    result = [
        ("Hugging Face Trainer, its defaults: examples/s", f"{statistics.median(other for other, _ in pairs):.1f}", ""),
        (
            f"ours ({'bfloat16' if uses_bfloat16('auto') else 'float32: this processor has no bfloat16'}): examples/s",
            f"{statistics.median(mine for _, mine in pairs):.1f}",
            "",
        ),
        (
            "ratio, median (lowest to highest) of the rounds",
            f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})",
            "≥ 2×",
        ),
    ]
    keep(
        "finetuning_speed",
        table(f"Fine-tuning speed, {len(data)} rows of {path.rsplit('/', 2)[-2]}, batch {BATCH}", result),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
