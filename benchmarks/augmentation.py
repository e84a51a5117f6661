"""What augmentation takes: 1,000 sentences through each operation, and through four word operations in turn.

`python benchmarks/augmentation.py --data train.tsv`, a file whose first column is a sentence. WordNet must be where
nltk looks for it. One thread; processor time of the best of 50 rounds, wall time of the same round beside it, for the
machine may be busy. The first round, which also looks up every synonym for the first time, is given by itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from common import keep, table

from moss_rlhf.strategy.augmentation import (
    Draws,
    WordOperation,
    change_text,
    key_of,
    word_operations,
    wordnet_synonyms,
)

FOUR = ("synonym", "insert", "swap", "delete")
RATES = dict.fromkeys((*FOUR, "typo", "keyboard"), 0.1) | {"punctuation": 0.3}
SENTENCES, ROUNDS, ASKED = 1000, 50, 25


def seconds(sentences: Sequence[str], operations: Sequence[WordOperation]) -> tuple[float, float]:
    """(processor, wall) time of one round."""
    key = key_of(0, 1)
    wall, processor = time.perf_counter(), time.process_time()
    for position, sentence in enumerate(sentences):
        change_text(sentence, operations, Draws(key_of(key, position)))
    return time.process_time() - processor, time.perf_counter() - wall


def row(name: str, times: tuple[float, float], asked: str = "") -> tuple[str, str, str]:
    return name, f"{times[0] * 1000:.1f} ms ({times[1] * 1000:.1f} ms wall)", asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    lines = parser.parse_args().data.read_text(encoding="utf-8").splitlines()[:SENTENCES]
    sentences = [line.split("\t")[0] for line in lines]
    started = time.process_time()
    wordnet_synonyms()
    loading = time.process_time() - started
    operations = word_operations(RATES, "en")
    four = [operation for operation in operations if operation.name in FOUR]
    rows = [row("four word operations, first round", seconds(sentences, four))]
    best = min(seconds(sentences, four) for _ in range(ROUNDS))
    rows.insert(0, row("four word operations in turn", best, f"≤ {ASKED} ms"))
    for operation in operations:
        rows.append(row(operation.name, min(seconds(sentences, [operation]) for _ in range(ROUNDS))))
    rows.append(("reading WordNet, once", f"{loading:.2f} s", ""))
    words = sum(len(sentence.split()) for sentence in sentences) / len(sentences)
    keep("augmentation", table(f"Augmenting {len(sentences):,} sentences of {words:.0f} words", rows))


if __name__ == "__main__":
    main()
