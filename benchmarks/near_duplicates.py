"""Our MinHash against datasketch's on AG News: seconds, and what each finds that really is alike.

python benchmarks/near_duplicates.py --data ../shared/data
"""

import argparse
import csv
import gzip
import time
from pathlib import Path

from common import keep, table
from datasketch import MinHash, MinHashLSH

from moss_rlhf.data.cleaning.minhash import even_out, jaccard, near_duplicates, shingles

ROWS, THRESHOLD = 3000, 0.8


def _datasketch(texts: list[str]) -> list[int]:
    """Rows that datasketch's index calls like an earlier one, by the same 5-grams and 128 functions."""
    index, found = MinHashLSH(threshold=THRESHOLD, num_perm=128), []
    for row, text in enumerate(texts):
        even, mark = even_out(text), MinHash(num_perm=128)
        mark.update_batch([even[start : start + 5].encode() for start in range(len(even) - 4)])
        if index.query(mark):
            found.append(row)
        else:
            index.insert(row, mark)
    return found


def _alike(texts: list[str], rows: list[int]) -> int:
    """How many of the rows are like any earlier text, by comparing them all."""
    sets = [shingles(text) for text in texts]
    return sum(any(jaccard(sets[row], sets[other]) >= THRESHOLD for other in range(row)) for row in rows)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, required=True, help="the folder that holds ag_news")
    options = arguments.parse_args()
    with gzip.open(options.data / "ag_news" / "noisy_annotators.csv.gz", "rt", encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:ROWS]
    rows, seconds = [], []
    finders = {
        "ours": lambda: [hit.row for hit in near_duplicates("train", texts, None, THRESHOLD)],
        "datasketch": lambda: _datasketch(texts),
    }
    for name, find in finders.items():
        started = time.perf_counter()
        found = find()
        seconds.append(time.perf_counter() - started)
        value = f"{seconds[-1]:.1f} s; {len(found)} rows found, {_alike(texts, found)} of them alike"
        rows.append((f"{name}, {ROWS:,} texts", value, ""))
    rows.append(("datasketch's seconds ÷ ours", f"{seconds[1] / seconds[0]:.2f}", ""))
    keep("near_duplicates", table("Near duplicates, Jaccard 0.8 over character 5-grams", rows))


if __name__ == "__main__":
    main()
