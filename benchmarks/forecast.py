"""The peak memory of a stage, foretold by `moss check`, against measured.

    python benchmarks/forecast.py --work <folder> [--only NAME …]

Each stage runs alone in a process of its own, as a run does it: data read and tokenized, the model loaded, the stage
under `PeakMemory`. The encoder is MiniLM (the extra `demo`) on the demo data, the decoder a GPT-2 shape of random
weights with a table of 50,257 tokens, the encoder-decoder a T5 shape.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

from common import keep, table

TOLERANCE = 0.15
STAGES = {
    "wanda": {"prune": {"method": "wanda", "sparsity": 0.5, "rows": 64}},
    "sparsegpt": {"prune": {"method": "sparsegpt", "sparsity": 0.5, "rows": 64}},
    "gptq": {"quantize": {"method": "gptq", "rows": 64}},
    "int8_static": {"quantize": {"scheme": "int8_static", "rows": 64}},
    "narrow": {"narrow": {"heads": 0.34, "feed_forward": 0.34, "rows": 64}},
    "shorten": {"shorten": {"remove": 1, "rows": 64}},
    "sensitivity": {"sensitivity": {"rows": 64}},
}
SERVED = {
    "minilm": ("sparsegpt", "int8_static", "narrow", "shorten", "sensitivity"),
    "gpt2": ("wanda", "sparsegpt", "gptq", "narrow", "shorten", "sensitivity"),
    "t5": ("sparsegpt", "narrow", "sensitivity"),
}
CHILD = """
import json, sys
from pathlib import Path
from moss_rlhf.checking import check
from moss_rlhf.evaluation import PeakMemory
from moss_rlhf.measuring import same_threads
from moss_rlhf.preparing import prepare
from moss_rlhf.progress import Progress, quiet_libraries
from moss_rlhf.recipe import make_recipe, stage_spec
from moss_rlhf.rundir import open_run
from moss_rlhf.stages import apply_stage
recipe = make_recipe(json.loads(sys.argv[1]))
quiet_libraries()
foretold = check(recipe).stages[0]
with open_run(Path(recipe.output), True) as place:
    session = prepare(recipe, place, Progress(quiet=True), same_threads())
    model, context = session.model_after(0), session.context(0)
    with PeakMemory() as peak:
        start = peak.bytes
        apply_stage(stage_spec(recipe.stages[0]), model, context)
print(json.dumps({"foretold": foretold.memory_bytes, "measured": peak.bytes, "start": start, "all": model.parameters}))
"""


def write_checkpoint(place: Path, kind: str) -> None:
    """Random weights, and a tokenizer that knows words by their names."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{index}": index + 3 for index in range(2000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=512, n_layer=3, n_head=8, vocab_size=50257, n_positions=256, **ids)
        network = AutoModelForCausalLM.from_config(config)
    else:
        sizes = {"num_layers": 2, "d_model": 256, "d_ff": 1024, "vocab_size": 32128, "decoder_start_token_id": 0}
        network = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, eos_token_id=1, pad_token_id=0))
    network.save_pretrained(place)
    fast.save_pretrained(place)


def write_texts(place: Path, columns: tuple[str, ...]) -> None:
    """100 rows of 20 to 60 random words."""
    draw = random.Random(0)  # noqa: S311
    with place.open("w", encoding="utf-8") as file:
        for _ in range(100):
            row = {name: " ".join(f"w{draw.randrange(2000)}" for _ in range(draw.randint(20, 60))) for name in columns}
            file.write(json.dumps(row) + "\n")


def recipe_of(kind: str, stage: str, work: Path) -> dict:
    common = {"stages": [STAGES[stage]], "output": str(work / f"{kind}-{stage}")}
    if kind == "minilm":
        demo = Path(__file__).parents[1] / "src/moss_rlhf/data/demo/english-train.csv"
        model = "sentence-transformers/all-MiniLM-L6-v2"
        return common | {"task": "text-classification", "model": model, "data": {"train": str(demo)}}
    columns = ("text",) if kind == "gpt2" else ("source", "target")
    if not (work / kind).exists():
        write_checkpoint(work / kind, kind)
    write_texts(work / f"{kind}.jsonl", columns)
    task = "text-generation" if kind == "gpt2" else "translation"
    data = {"train": str(work / f"{kind}.jsonl"), "validation": 0.1}
    return common | {"task": task, "model": str(work / kind), "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[], help="such as gpt2-narrow")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind, stages in SERVED.items():
        for stage in stages:
            if options.only and f"{kind}-{stage}" not in options.only:
                continue
            command = [sys.executable, "-c", CHILD, json.dumps(recipe_of(kind, stage, options.work))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            said = json.loads(done.stdout.strip().splitlines()[-1])
            off = said["foretold"] / said["measured"] - 1
            words = f"{said['foretold'] / 1e6:.0f} MB, measured {said['measured'] / 1e6:.0f} MB, {off:+.1%}"
            rows.append((f"{kind}, {stage} (began at {said['start'] / 1e6:.0f} MB)", words, f"± {TOLERANCE:.0%}"))
            print(rows[-1], flush=True)
    if not options.only:
        keep("forecast", table("Peak memory of a stage, foretold by moss check", rows, ("stage", "foretold", "asked")))


if __name__ == "__main__":
    main()
