"""Examples per second of fine-tuning: ours against the Hugging Face Trainer with its defaults, all else equal.

`python benchmarks/finetuning_speed.py --data FOLDER [--rounds 3]`; they take turns: a noisy machine slows both.
Theirs: random order, dynamic padding, float32. Ours: length buckets, quick dropout, kept memory, and bfloat16 where the
processor has it. FOLDER holds sst2/train.tsv and imdb/train.tsv.gz.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import statistics
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


def read_rows(path: str | Path, most: int) -> list[dict]:
    """Every so many-th line of `text<tab>class id`, or of IMDB's `id, label, rating, text`."""
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        cells = [cell for cell in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if cell[1] in ("0", "1")]
    stride = max(1, len(cells) // most)
    chosen = cells[::stride][:most]
    return [{"text": cell[0 if len(cell) == 2 else 3], "label": LABELS[int(cell[1])]} for cell in chosen]


def fresh_model():
    torch.manual_seed(0)
    return load(MODEL, labels=LABELS)


class Clock(TrainerCallback):
    """Seconds from the first step to the last."""

    def on_train_begin(self, *_, **__) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *_, **__) -> None:
        self.seconds = time.perf_counter() - self.started


def theirs(rows, longest: int = 128) -> float:
    model, clock = fresh_model(), Clock()
    data = encoded(model, rows, longest).remove_columns(["length"])
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


def ours(rows, longest: int = 128) -> float:
    model = fresh_model()
    train, look = encoded(model, rows, longest), encoded(model, rows[:2], longest)
    training = finetune(model, train, look, epochs=1, batch_size=BATCH)
    return len(rows) / training.facts["seconds"]


def compared(name: str, data: list[dict], longest: int, rounds: int, asked: str) -> list[tuple[str, str, str]]:
    pairs = [(theirs(data, longest), ours(data, longest)) for _ in range(rounds)]
    ratios = [mine / other for other, mine in pairs]
    spread = f"{statistics.median(ratios):.2f}× ({min(ratios):.2f} to {max(ratios):.2f})"
    precision = "bfloat16" if uses_bfloat16("auto") else "float32: this processor has no bfloat16"
    title = f"{name}, {len(data)} rows"
    return [
        (f"{title}: the Trainer's defaults, examples/s", f"{statistics.median(other for other, _ in pairs):.1f}", ""),
        (f"{title}: ours ({precision}), examples/s", f"{statistics.median(mine for _, mine in pairs):.1f}", ""),
        (f"{title}: ratio, median (lowest to highest) of the rounds", spread, asked),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    short = read_rows(options.data / "sst2" / "train.tsv", 1600)
    long = read_rows(options.data / "imdb" / "train.tsv.gz", 160)
    rows = compared("sst2", short, 128, options.rounds, "≥ 2.5×")
    rows += compared("imdb at 256 tokens", long, 256, options.rounds, "≥ 2×")
    keep("finetuning_speed", table(f"Fine-tuning speed against the Hugging Face Trainer, batch {BATCH}", rows))


if __name__ == "__main__":
    main()
