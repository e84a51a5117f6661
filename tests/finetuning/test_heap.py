"""Freed memory is kept while it is asked for."""

import os
import subprocess
import sys

import pytest
import torch

from moss_rlhf.finetuning import heap
from moss_rlhf.finetuning.heap import bound_kernel_caches, kept_memory
from moss_rlhf.model.processor import fast_bfloat16, processor_flags

# in a process of its own: what other tests did to the C library's settings would show
CHILD = """
import resource, torch
from moss_rlhf.finetuning.heap import kept_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
without = min(faults(), faults())
with kept_memory():
    faults(), faults()
    print(without, faults())
"""


@pytest.mark.skipif(sys.platform != "linux" or heap.glibc() is None, reason="glibc's")
def test_a_tensor_takes_the_pages_of_the_one_before():
    said = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout
    without, within = map(int, said.split())
    assert without > 10_000
    assert within < 1000


LENGTHS = """
import ctypes, os, sys, torch
from moss_rlhf.finetuning.heap import bound_kernel_caches
if sys.argv[1] == "bounded":
    bound_kernel_caches()
torch.set_num_threads(1)
layer = torch.nn.Linear(256, 256)
def resident():
    ctypes.CDLL(None).malloc_trim(0)
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
def train(lengths):
    for length in lengths:
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.ones(length, 256)).float().sum().backward()
train(range(64, 72))
before = resident()
train(range(72, 600))
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or heap.glibc() is None, reason="glibc's")
@pytest.mark.skipif(not fast_bfloat16(processor_flags()), reason="emulated bfloat16 keeps no kernels")
def test_kernels_of_lengths_that_are_gone_go_too():
    command = [sys.executable, "-c", LENGTHS]
    plain = {name: value for name, value in os.environ.items() if name not in heap._KERNELS}  # another test's trainings
    free, bounded = (
        int(subprocess.run([*command, way], capture_output=True, text=True, check=True, env=plain).stdout)
        for way in ("free", "bounded")
    )
    if free < 8e6:
        pytest.skip("this processor's bfloat16 keeps no kernels")
    assert bounded < free / 4


def test_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    bound_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7" and os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "glibc", lambda: None)
    with kept_memory():
        assert torch.ones(2).sum() == 2
