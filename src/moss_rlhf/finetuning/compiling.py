"""torch.compile where it pays: a few steps are timed both ways, and the faster is kept.

Compiling takes a minute or two on a processor, so it pays in long trainings only, and not with every network. What was
chosen is written beside the checkpoints: a resumed training goes on the same way, whatever the clock would say now.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from moss_rlhf.files import read_json, write_json

Compile = Literal["off", "on", "auto"]
CHOICE = "compile.json"
_GAIN = 0.95  # of the plain time: less is not worth another order of summation
_LEAST_SECONDS = 300.0  # of a plain training: below, compiling costs more than it can gain
Step = Callable[[Any], None]


def compile_where_it_pays(
    network: Any, wanted: Compile, batches: Sequence[Any], step: Step, steps: int, folder: Path
) -> dict[str, Any]:
    """Compile `network` in place, or leave it; returns the facts.

    batches   a few of the training's, of several lengths.
    step      forward and backward of one batch; gradients are dropped afterwards.
    steps     of the whole training.
    folder    where the choice is kept.
    """
    if wanted == "off":
        return {}
    place = folder / CHOICE
    if not place.exists():
        write_json(place, _choose(network, wanted, batches, step, steps))
    facts = read_json(place)
    undo(network)
    if facts["compiled"]:
        network.compile(dynamic=True)
    return {"compile": facts}


def undo(network: Any) -> None:
    """Back to the network as it is written."""
    network._compiled_call_impl = None  # what Module.compile sets; it has no way back of its own


def _choose(network: Any, wanted: Compile, batches: Sequence[Any], step: Step, steps: int) -> dict[str, Any]:
    if wanted == "on":
        return {"compiled": True}
    with torch.random.fork_rng():
        plain = _median_seconds(network, batches, step)
        if plain * steps < _LEAST_SECONDS:
            why = f"the training takes {plain * steps:.0f} s uncompiled; compiling pays from {_LEAST_SECONDS:.0f} s on"
            return {"compiled": False, "why": why}
        started = time.monotonic()
        try:
            network.compile(dynamic=True)
            for batch in batches:  # the first shape compiles for itself, the second for any
                step(batch)
        except Exception as error:  # whatever the compiler stumbles over: a missing g++, an operation it can't do
            undo(network)
            return {"compiled": False, "why": f"it can't be compiled here: {type(error).__name__}"}
        spent = time.monotonic() - started
        compiled = _median_seconds(network, batches, step)
    return {
        "compiled": compiled < _GAIN * plain,
        "step_seconds": plain,
        "compiled_step_seconds": compiled,
        "compile_seconds": spent,
    }


def _median_seconds(network: Any, batches: Sequence[Any], step: Step) -> float:
    seconds = []
    for batch in batches:
        started = time.monotonic()
        step(batch)
        seconds.append(time.monotonic() - started)
    network.zero_grad()
    return statistics.median(seconds)
