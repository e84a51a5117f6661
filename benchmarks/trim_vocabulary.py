"""What trimming MiniLM's vocabulary to SST-2's sentences saves, and what it changes for sentences never seen.

`python benchmarks/trim_vocabulary.py --data FOLDER`, a folder with train.tsv and dev.tsv (sentence, label). Every dev
sentence that uses kept pieces only must encode to the same pieces, or the script stops; one in eight of them is run
through both models, and the largest difference of logits printed.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import torch
from common import keep, table

from moss_rlhf.model.checkpoint import Model, save_checkpoint
from moss_rlhf.optimization.trim_vocabulary import trim_vocabulary
from moss_rlhf.progress import quiet_libraries
from moss_rlhf.tasks.loading import load

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
LABELS = ("negative", "positive")
SETTINGS = {
    "default": {},
    "characters: seen": {"characters": "seen"},
    "minimum_count: 2": {"minimum_count": 2},
    "minimum_count: 3, seen": {"minimum_count": 3, "characters": "seen"},
}


def read_texts(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [cells[0] for cells in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def megabytes(model: Model) -> tuple[float, float]:
    """Of the weights and of the tokenizer, as saved."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model"
        save_checkpoint(model, place)
        sizes = {file.name: file.stat().st_size / 1e6 for file in place.iterdir()}
    return sizes["model.safetensors"], sizes["tokenizer.json"]


def same(before: Model, after: Model, texts: list[str]) -> tuple[int, float]:
    """Texts of kept pieces only, and the largest difference of their logits; stops where pieces differ."""
    kept, checked, worst = set(after.tokenizer.get_vocab()), 0, 0.0
    for text in texts:
        pieces = before.tokenizer.tokenize(text)
        if not kept.issuperset(pieces):
            continue
        if after.tokenizer.tokenize(text) != pieces:
            raise SystemExit(f"encodes differently: {text}")
        checked += 1
        if checked % 8 == 0:
            with torch.inference_mode():
                logits = [
                    model.network(**model.tokenizer(text, return_tensors="pt")).logits for model in (before, after)
                ]
            worst = max(worst, float((logits[0] - logits[1]).abs().max()))
    return checked, worst


def measure(dense: Model, name: str, train: list[str], dev: list[str]) -> list[tuple[str, str, str]]:
    model, started = deepcopy(dense), time.perf_counter()
    facts = trim_vocabulary(model, train, held_out=dev, **SETTINGS[name])
    seconds = time.perf_counter() - started
    checked, worst = same(dense, model, dev)
    new, share = facts["held_out"], model.parameters / dense.parameters
    return [
        (name, f"{describe(model)}; {share:.2f}× the parameters; {seconds:.1f} s", ""),
        ("… held-out tokens that went", f"{new['tokens_gone']:.2%}", ""),
        ("… held-out unknown tokens; all tokens", f"{new['unknown']}; {new['tokens']}", ""),
        ("… held-out sentences of kept pieces", f"{checked} of {len(dev)}", ""),
        ("… of those that encode the same; logits differ by", f"{checked}; {worst:.1g}", "all; ≤ 1e-6"),
    ]


def describe(model: Model) -> str:
    weights, tokenizer = megabytes(model)
    return (
        f"{len(model.tokenizer)} tokens, {model.parameters / 1e6:.2f} M parameters, {weights:.1f} MB of weights, "
        f"{tokenizer:.2f} MB of tokenizer"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    quiet_libraries()
    torch.manual_seed(0)
    train, dev = read_texts(data / "train.tsv"), read_texts(data / "dev.tsv")
    dense = load(MODEL, labels=LABELS)
    dense.network.eval()
    rows = [("before", describe(dense), "")]
    for name in SETTINGS:
        rows += measure(dense, name, train, dev)
    keep("trim_vocabulary", table(f"Trimming MiniLM's vocabulary to {len(train)} sentences of {data.name}", rows))


if __name__ == "__main__":
    main()
