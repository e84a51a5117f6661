"""Peak memory of fine-tuning: ours against the Hugging Face Trainer with its defaults, each in a process of its own.

`python benchmarks/training_memory.py --data FOLDER`; FOLDER holds sst2/train.tsv and imdb/train.tsv.gz. What is
compared is the most that each process held in RAM (VmHWM), libraries and data included; the cached prefix is on disk.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from common import keep, table
from finetuning_speed import BATCH, ours, read_rows, theirs
from prefix_cache import ours as cached

from moss_rlhf.model.peak import own_peak
from moss_rlhf.model.runtime import usable_cores
from moss_rlhf.progress import quiet_libraries

SETS = {"sst2": ("sst2/train.tsv", 960, 128), "imdb at 256 tokens": ("imdb/train.tsv.gz", 160, 256)}
WAYS = {
    "the Trainer's defaults": theirs,
    "ours": ours,
    "ours, 4 of 6 blocks frozen and cached": lambda rows, _: cached(rows, {"epochs": 1, "required": True}),
}


def child(data: Path, name: str, way: str) -> None:
    """Train, and print the peak."""
    quiet_libraries()
    torch.set_num_threads(usable_cores())
    file, rows, longest = SETS[name]
    WAYS[way](read_rows(data / file, rows), longest)
    print(own_peak())


def peak(data: Path, name: str, way: str) -> int:
    command = [sys.executable, __file__, "--data", str(data), "--child", name, way]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(said.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options.data, *options.child)
    rows = []
    for name in SETS:
        first = 0
        for way in WAYS:
            found = peak(options.data, name, way)
            first = first or found
            asked = "≤ 1.05×" if way != next(iter(WAYS)) else ""
            rows.append((f"{name}: {way}", f"{found / 1e9:.2f} GB, {found / first:.2f}×", asked))
            print(rows[-1], flush=True)
    keep("training_memory", table(f"Peak memory of fine-tuning, batch {BATCH}", rows))


if __name__ == "__main__":
    main()
