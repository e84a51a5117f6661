"""Time and memory of pruning and quantizing a Llama of 7-billion shape on a GPU, random weights in bfloat16.

`python benchmarks/large_decoder.py [--layers 32] [--rows 64] [--tokens 2048]`

Random weights say nothing of quality; time and memory don't ask what the numbers are. Fewer layers are a smaller model
of the same width: seconds a layer stay what they are.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import keep, table
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import moss_rlhf
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.progress import quiet_libraries

GIB = 2**30
WAYS = {
    "Wanda, 50 %": (moss_rlhf.prune, {"method": "wanda", "sparsity": 0.5}),
    "SparseGPT, 50 %": (moss_rlhf.prune, {"method": "sparsegpt", "sparsity": 0.5}),
    "GPTQ, int4 in groups of 128": (moss_rlhf.quantize, {"method": "gptq", "scheme": "int4", "group_size": 128}),
}


def build(layers: int) -> Model:
    words = {f"w{index}": index for index in range(32000)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=4096, pad_token_id=0)
    with torch.device("cuda"):
        network = LlamaForCausalLM(config).to(torch.bfloat16)
    return Model(network.eval(), tokenizer, "text-generation")


def measure(way: str, layers: int, rows: int, tokens: int) -> tuple[str, str, str]:
    method, options = WAYS[way]
    model = build(layers)
    drawn = torch.randint(5, 32000, (rows, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict({"input_ids": drawn, "length": [tokens] * rows})
    torch.cuda.reset_peak_memory_stats()
    weights, started = torch.cuda.memory_allocated(), time.perf_counter()
    method(model, data, **options, rows=rows, seed=0)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    print(way, f"{seconds:.1f} s", f"{peak / GIB:.1f} GiB", flush=True)
    return way, f"{seconds:.0f} s, {seconds / layers:.2f} s a layer", f"{peak / GIB:.1f} GiB, {peak / weights:.2f}×"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("large_decoder.py: needs a GPU; memory.py measures a smaller one on a processor.")
    quiet_libraries()
    rows = [measure(way, options.layers, options.rows, options.tokens) for way in WAYS]
    name = torch.cuda.get_device_name()
    title = f"A Llama of width 4096, {options.layers} layers, {options.rows} rows of {options.tokens} tokens, {name}"
    keep("large_decoder", table(title, rows, ("what", "time", "peak GPU memory, and to the weights'")))


if __name__ == "__main__":
    main()
