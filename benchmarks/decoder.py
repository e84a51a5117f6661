"""A small decoder trained from nothing on nine novels, then compressed: perplexity against dense on held-out text.

`python benchmarks/decoder.py train --data GUTENBERG_FOLDER --output CHECKPOINT`; and, on what it left,
`python benchmarks/decoder.py compress --model CHECKPOINT`.

A Llama shape with grouped-query attention; every width is a multiple of 128, so that int4 in groups of 128 fits every
matrix. The last share of each book is held out whole: no paragraph, and no neighbour of one, stands on both sides.
"""

from __future__ import annotations

import argparse
import gzip
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import keep, table
from datasets import Dataset
from torch import Tensor

import moss_rlhf
from moss_rlhf.files import new_directory, write_json, write_text
from moss_rlhf.finetuning.running import uses_bfloat16
from moss_rlhf.progress import quiet_libraries

VOCABULARY = 4096
WINDOW = 256  # tokens
HELD_OUT = 0.05  # of each book's characters, its end
END = "<|endoftext|>"
HEADER = re.compile(r"^\*\*\* ?START OF.*$", re.MULTILINE)
FOOTER = re.compile(r"^(?:\*\*\* ?)?END OF (?:THE |THIS )?PROJECT GUTENBERG", re.MULTILINE | re.IGNORECASE)
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
WARMUP = 200  # steps
LARGEST_NORM = 1.0  # of the gradients
EVERY_STEPS = 250  # a line of progress
EVERY_SECONDS = 600  # a checkpoint that others may already use
TRAIN_TEXT, HELD_OUT_TEXT, FACTS = "train.txt", "held-out.txt", "training.json"
SEEDS = (0, 1, 2)
CALIBRATION_ROWS = 128


# Text


def read_book(place: Path) -> list[str]:
    """A novel's paragraphs, each on one line, without the Project Gutenberg's header, footer and credits."""
    with gzip.open(place, "rt", encoding="utf-8") as file:
        text = file.read()
    text = HEADER.split(text, maxsplit=1)[-1]
    text = FOOTER.split(text, maxsplit=1)[0]
    paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text)]
    return [paragraph for paragraph in paragraphs if paragraph and not _is_credit(paragraph)]


def _is_credit(paragraph: str) -> bool:
    return bool(re.match(r"Produced by |An Anonymous Volunteer|\[Project Gutenberg", paragraph))


def split_book(paragraphs: list[str], share: float) -> tuple[str, str]:
    """(train, held out): whole paragraphs, the held-out ones the last `share` of the book's characters."""
    ends = np.cumsum([len(paragraph) for paragraph in paragraphs])
    cut = int(np.searchsorted(ends, ends[-1] * (1 - share)))
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


def read_books(folder: Path) -> tuple[str, str]:
    """(train, held out) of all books of a folder, in the order of their names, with END between them."""
    places = sorted(folder.glob("*.txt.gz"))
    if not places:
        raise SystemExit(f"--data {folder}: holds no .txt.gz. Give the folder of Project Gutenberg's texts.")
    halves = [split_book(read_book(place), HELD_OUT) for place in places]
    return END.join(train for train, _ in halves), END.join(held_out for _, held_out in halves)


def train_tokenizer(text: str):
    """A byte-level BPE of VOCABULARY pieces, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(re.split(r"(?<=\n\n)", text.replace(END, "\n\n")), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=WINDOW
    )


def encode(tokenizer, text: str) -> Tensor:
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def batches(tokens: Tensor, steps: int, size: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches (size, WINDOW) of packed text; every pass cuts elsewhere and has an order of its own."""
    generator = np.random.default_rng(seed)
    waiting: list[Tensor] = []
    for _ in range(steps):
        while len(waiting) < size:
            windows = cut_windows(tokens[int(generator.integers(WINDOW)) :])
            waiting += [windows[position] for position in generator.permutation(len(windows))]
        yield torch.stack(waiting[:size])
        del waiting[:size]


def cut_windows(tokens: Tensor) -> Tensor:
    """(windows, WINDOW), side by side; the rest that fills no window is left out."""
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


# Training


def build_network(tokenizer, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=WINDOW,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            **SHAPE,
        )
    )


def cosine(step: int, total: int) -> float:
    """Rises linearly over WARMUP steps, then falls along half a cosine to 0 after the last."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / max(1, total - WARMUP)))


def optimizer_of(network, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; norms' scales do not decay."""
    matrices = [parameter for parameter in network.parameters() if parameter.dim() > 1]
    scales = [parameter for parameter in network.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def train_step(network, optimizer: torch.optim.Optimizer, batch: Tensor, learning_rate: float) -> float:
    """One step; the mean loss per token before it, in nats."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    batch = batch.to(network.device)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=uses_bfloat16("auto")):
        loss = network(input_ids=batch, labels=batch, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), LARGEST_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@torch.inference_mode()
def perplexity(network, tokens: Tensor) -> float:
    """exp of the mean loss over side-by-side windows, in float32; a window's first token is given, not predicted."""
    network.eval()
    losses = [
        float(network(input_ids=batch, labels=batch, use_cache=False).loss) * len(batch)
        for batch in cut_windows(tokens).to(network.device).split(8)
    ]
    return math.exp(sum(losses) / len(cut_windows(tokens)))


def save(place: Path, network, tokenizer, texts: dict[str, str], facts: dict) -> None:
    """Weights, tokenizer, both texts and what was measured, at `place` whole or not at all."""
    with new_directory(place) as partial:
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, text in texts.items():
            write_text(partial / name, text)
        write_json(partial / FACTS, facts)


def train(data: Path, output: Path, *, steps: int, batch_size: int, learning_rate: float, seed: int) -> None:
    if output.exists():
        raise SystemExit(f"--output {output}: exists; a trained model stays as it is. Give a new directory.")
    train_text, held_out_text = read_books(data)
    texts = {TRAIN_TEXT: train_text, HELD_OUT_TEXT: held_out_text}
    tokenizer = train_tokenizer(train_text)
    tokens, held_out = encode(tokenizer, train_text), encode(tokenizer, held_out_text)
    network = build_network(tokenizer, seed).to("cuda" if torch.cuda.is_available() else "cpu")
    optimizer = optimizer_of(network, learning_rate)
    sizes = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "block_parameters": sum(parameter.numel() for parameter in network.model.layers.parameters()),
        "train_tokens": len(tokens),
        "held_out_tokens": len(held_out),
    }
    print(", ".join(f"{name} {value:,}" for name, value in sizes.items()), flush=True)

    def facts(step: int) -> dict:
        seen = step * batch_size * WINDOW
        return {**sizes, "seed": seed, "steps": step, "of": steps, "batch": batch_size, "lr": learning_rate} | {
            "tokens_seen": seen,
            "passes": seen / len(tokens),
            "seconds": time.perf_counter() - started,
        }

    started = saved = time.perf_counter()
    losses: list[float] = []
    for step, batch in enumerate(batches(tokens, steps, batch_size, seed), start=1):
        network.train()
        losses.append(train_step(network, optimizer, batch, learning_rate * cosine(step - 1, steps)))
        if step % EVERY_STEPS == 0:
            now = facts(step)
            print(
                f"step {step}/{steps}  loss {statistics.fmean(losses[-EVERY_STEPS:]):.3f}  held-out perplexity, first "
                f"16k tokens, {perplexity(network, held_out[: 64 * WINDOW]):.2f}  passes {now['passes']:.2f}  "
                f"tokens/s {now['tokens_seen'] / now['seconds']:.0f}  seconds {now['seconds']:.0f}",
                flush=True,
            )
        if time.perf_counter() - saved > EVERY_SECONDS:
            save(output.with_name(f"{output.name}-latest"), network, tokenizer, texts, facts(step))
            saved = time.perf_counter()
    result = facts(steps) | {"held_out_perplexity": perplexity(network, held_out)}
    save(output, network, tokenizer, texts, result)
    print(result, flush=True)


# Compression


def calibration_windows(tokens: Tensor) -> Dataset:
    """Encoded rows of WINDOW tokens each: given as text, some would come back a token longer and be cut in two."""
    windows = cut_windows(tokens)
    return Dataset.from_dict({"input_ids": windows.tolist(), "length": [WINDOW] * len(windows)})


def compressed_perplexity(place: Path, rows: Dataset, held_out: Tensor, method: str, seed: int) -> float:
    """Held-out perplexity of a fresh copy of the model after one method."""
    model = moss_rlhf.load(place, task="text-generation")
    if method in ("nearest", "gptq"):
        moss_rlhf.quantize(model, rows, method=method, scheme="int4", group_size=128, rows=CALIBRATION_ROWS, seed=seed)
    else:
        moss_rlhf.prune(model, rows, method=method, sparsity=0.5, rows=CALIBRATION_ROWS, seed=seed)
    return perplexity(model.network, held_out)


def ratio_row(name: str, values: list[float], dense: float, asked: str = "") -> tuple[str, str, str]:
    ratios = [value / dense for value in values]
    measured = f"{statistics.fmean(values):.2f}: {statistics.fmean(ratios):.3f}×"
    spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if max(ratios) > min(ratios) else ""
    return name, measured + spread, asked


def compress(place: Path) -> None:
    model = moss_rlhf.load(place, task="text-generation")
    rows = calibration_windows(encode(model.tokenizer, (place / TRAIN_TEXT).read_text(encoding="utf-8")))
    held_out = encode(model.tokenizer, (place / HELD_OUT_TEXT).read_text(encoding="utf-8"))
    dense = perplexity(model.network, held_out)
    found = {
        method: [compressed_perplexity(place, rows, held_out, method, seed) for seed in SEEDS]
        for method in ("magnitude", "wanda", "sparsegpt", "nearest", "gptq")
    }
    removed = [
        1 - (gptq - dense) / (nearest - dense) for gptq, nearest in zip(found["gptq"], found["nearest"], strict=True)
    ]
    result = [
        (f"dense, {len(cut_windows(held_out)) * WINDOW:,} held-out tokens", f"{dense:.2f}", ""),
        ratio_row("50 % magnitude, layer by layer", found["magnitude"], dense),
        ratio_row("50 % Wanda", found["wanda"], dense, "≤ 1.35×, below magnitude's"),
        ratio_row("50 % SparseGPT", found["sparsegpt"], dense, "≤ 1.30×, below magnitude's"),
        ratio_row("int4 in groups of 128, round to nearest", found["nearest"], dense),
        ratio_row("int4 in groups of 128, GPTQ", found["gptq"], dense),
        (
            "share of round-to-nearest's excess that GPTQ removes",
            f"{statistics.fmean(removed):.0%} ({min(removed):.0%} to {max(removed):.0%})",
            "≥ 60 %",
        ),
    ]
    title = "A small decoder: perplexity on held-out text, mean (lowest to highest) of three seeds"
    keep("decoder", table(title, result))


# Command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train the decoder and keep it")
    training.add_argument("--data", type=Path, required=True, help="folder of Project Gutenberg's .txt.gz")
    training.add_argument("--output", type=Path, required=True, help="directory of the checkpoint, new")
    training.add_argument("--steps", type=int, default=5500)
    training.add_argument("--batch-size", type=int, default=4, help=f"sequences of {WINDOW} tokens a step")
    training.add_argument("--learning-rate", type=float, default=2e-3)
    training.add_argument("--seed", type=int, default=0)
    compressing = commands.add_parser("compress", help="compress it by every method and print the table")
    compressing.add_argument("--model", type=Path, required=True, help="the checkpoint that train left")
    given = parser.parse_args()
    quiet_libraries()
    if given.command == "compress":
        compress(given.model)
    else:
        train(
            given.data,
            given.output,
            steps=given.steps,
            batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            seed=given.seed,
        )


if __name__ == "__main__":
    main()
