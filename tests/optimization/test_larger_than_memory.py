"""A checkpoint that is larger than the memory taken is pruned, quantized and saved.

What is measured is the growth of RssAnon: a limit on address space or data would count the mapped file, too.
"""

import subprocess
import sys

import pytest

import moss_rlhf

CHILD = """
import re, sys, threading, time
import torch
from datasets import Dataset
import moss_rlhf
place, small, method = sys.argv[1:]
torch.set_num_threads(1)
tokens = torch.randint(5, 50, (8, 64), generator=torch.Generator().manual_seed(0)).tolist()
rows = Dataset.from_dict({"input_ids": tokens, "length": [64] * 8})
def work(place):
    model = moss_rlhf.load(place, task="text-generation", offload=True)
    if method == "gptq":
        moss_rlhf.quantize(model, rows, method="gptq", rows=8)
    else:
        moss_rlhf.prune(model, rows, method=method, sparsity=0.5, rows=8)
    moss_rlhf.save(model, place + "-" + method)
def held():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
if method != "whole":
    work(small)  # what the libraries take at first
started = most = held()
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
if method == "whole":
    model = moss_rlhf.load(place, task="text-generation", offload=True)
    kept = [parameter.detach().clone() for parameter in model.network.parameters()]
else:
    work(place)
time.sleep(0.05)
print(most - started)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory):
    """About 230 MB in 16 blocks, and one of 2 such blocks."""
    places = [tmp_path_factory.mktemp("large") / name for name in ("model", "small")]
    for place, blocks in zip(places, (16, 2), strict=True):
        moss_rlhf.save(tiny_model("llama", hidden=512, heads=8, blocks=blocks, feed_forward=1600), place)
    return places


def grown_share(checkpoints, method):
    """How far the memory grew, as a share of the checkpoint."""
    size = sum(file.stat().st_size for file in checkpoints[0].glob("*.safetensors"))
    command = [sys.executable, "-c", CHILD, *map(str, checkpoints), method]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / size


def test_reading_it_whole_would_show(checkpoints):
    assert grown_share(checkpoints, "whole") > 0.9


@pytest.mark.parametrize("method", ["wanda", "gptq", pytest.param("sparsegpt", marks=pytest.mark.slow)])
def test_the_work_takes_a_part_of_it(checkpoints, method):
    assert grown_share(checkpoints, method) < 0.6
    saved = moss_rlhf.load(f"{checkpoints[0]}-{method}", task="text-generation")
    assert saved.quantization if method == "gptq" else saved.pruned
