"""Peak memory of pruning and quantizing a checkpoint that stays on disk: a Llama of 1.1 billion random weights.

    python benchmarks/memory.py --work <folder with 10 GB free> [--layers 22]

Each method runs in a process of its own; its peak of anonymous memory (RssAnon) is compared with the checkpoint's size.
Pages of the mapped file do not count: the kernel takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import keep, table

CHILD = """
import json, sys, time
import torch
from datasets import Dataset
import moss_rlhf
place, out, method, count = *sys.argv[1:4], int(sys.argv[4])
torch.manual_seed(0)
model = moss_rlhf.load(place, task="text-generation", offload=True)
tokens = torch.randint(5, 31000, (count, 256)).tolist()
rows = Dataset.from_dict({"input_ids": tokens, "length": [256] * count})
started = time.monotonic()
options = {"rows": count, "seed": 0}
if method == "gptq":
    moss_rlhf.quantize(model, rows, scheme="int4", method="gptq", **options)
else:
    moss_rlhf.prune(model, rows, method=method, sparsity=0.5, **options)
seconds = time.monotonic() - started
moss_rlhf.save(model, out)
print(json.dumps({"seconds": seconds, "blocks": len(model.anatomy.blocks)}))
"""


def write_checkpoint(place: Path, layers: int) -> None:
    """Random weights, a shard a block, so that nothing large is ever in memory."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    place.mkdir(parents=True)
    hidden, inner, heads, pairs, vocabulary = 2048, 5632, 32, 4, 32000
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=2048,
        architectures=["LlamaForCausalLM"], pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(place)
    words = {f"w{index}": index for index in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2").save_pretrained(place)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int):
        return torch.randn(*shape, generator=generator) * 0.02

    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden * pairs // heads, hidden),
        "self_attn.v_proj": (hidden * pairs // heads, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    norms = ("input_layernorm", "post_attention_layernorm")
    for index in range(layers):
        block = {f"model.layers.{index}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        block |= {f"model.layers.{index}.{name}.weight": torch.ones(hidden) for name in norms}
        save_file(block, place / f"model-{index:05d}.safetensors")
    outside = {"model.embed_tokens.weight": draw(vocabulary, hidden), "lm_head.weight": draw(vocabulary, hidden)}
    save_file(outside | {"model.norm.weight": torch.ones(hidden)}, place / "model-outside.safetensors")


def measure(place: Path, out: Path, method: str, rows: int) -> tuple[int, dict]:
    """(peak RssAnon in bytes, what the child says)."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, place, out, method, str(rows)], stdout=subprocess.PIPE, text=True
    )
    peak = [0]

    def watch() -> None:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            with contextlib.suppress(OSError):  # it may end just now
                found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
                peak[0] = max(peak[0], int(found[1]) * 1024 if found else 0)
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said, _ = child.communicate()
    watcher.join()
    if child.returncode:
        raise SystemExit(f"{method} failed")
    return peak[0], json.loads(said.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt", "gptq"])
    parser.add_argument("--rows", type=int, default=64, help="calibration rows of 256 tokens")
    options = parser.parse_args()
    place = options.work / f"llama-{options.layers}"
    if not place.exists():
        write_checkpoint(place, options.layers)
    size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
    rows = []
    for method in options.methods:
        out = options.work / f"out-{method}"
        peak, said = measure(place, out, method, options.rows)
        for file in out.glob("*"):
            file.unlink()
        seconds = said["seconds"] / said["blocks"]
        rows.append(
            (method, f"{peak / 1e9:.2f} GB, {peak / size:.2f} × checkpoint; {seconds:.1f} s a block", "≤ 0.40 ×")
        )
        print(rows[-1], flush=True)
    keep(
        "memory",
        table(f"Peak memory, a checkpoint of {size / 1e9:.2f} GB in float32, {options.rows} rows of 256 tokens", rows),
    )


if __name__ == "__main__":
    main()
