"""Shorten the stack: drop whole blocks.

Two scores. `loss` measures what dropping a block costs: blocks go one at a time, always the one whose loss without it
is lowest. `angular` (Gromov et al. 2024, arXiv:2403.17887, §3.2) needs one pass: the n neighbouring blocks go that turn
their input least, d(l) = arccos(cos(x_l, x_{l+n})) / π, the mean over tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.surgery import keep_blocks, only_blocks
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches, mean_loss
from moss_rlhf.progress import Progress
from moss_rlhf.tasks.loading import encoded


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Arccos of the cosine over π, in 0 … 1, of each token. before, after (…, hidden); returns (…)."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def shorten(
    model: Model,
    train: Any,
    *,
    remove: int = 1,
    score: Literal["loss", "angular"] = "loss",
    rows: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Drop `remove` blocks in place; returns the facts: which went, and every candidate's score.

    train    rows with labels; `rows` of them, drawn by `seed`, are scored on.
    raises   ModelError on a quantized model, or where no block would stay.
    """
    depth = len(model.anatomy.blocks)
    if model.quantization:
        raise ModelError("shorten: the model is quantized already; shorten it before, then quantize.")
    if not 0 < remove < depth:
        raise ModelError(
            f"shorten: can't remove {remove} of {depth} layers; at least one must stay and one must go. "
            f"Give 1 to {depth - 1}."
        )
    sample = calibration_rows(encoded(model, train), rows, seed)
    choose = _by_loss if score == "loss" else _by_angle
    dropped, scores = choose(model, sample, remove, progress or Progress(quiet=True))
    keep_blocks(model.network, [index for index in range(depth) if index not in dropped])
    left = {id(parameter) for parameter in model.network.parameters()}
    model.pruned = [parameter for parameter in model.pruned if id(parameter) in left]
    return {
        "layers": f"{depth} → {depth - remove}",
        "dropped": sorted(dropped),
        "score": score,
        "scores": scores,
        "rows_scored": len(sample),
        "faster_here": f"yes: {remove} of {depth} blocks are not computed any more",
    }


def _by_loss(model: Model, sample: Any, remove: int, progress: Progress) -> tuple[list[int], list[dict[str, float]]]:
    dropped: list[int] = []
    rounds: list[dict[str, float]] = []
    depth = len(model.anatomy.blocks)
    with progress.bar("dropping layers", sum(depth - count for count in range(remove))) as bar:
        for _ in range(remove):
            losses = {}
            for index in sorted(set(range(depth)) - set(dropped)):
                staying = [block for block in range(depth) if block not in (*dropped, index)]
                with only_blocks(model.network, staying):
                    losses[index] = mean_loss(model, sample)
                bar.advance()
            dropped.append(min(losses, key=lambda index: (losses[index], index)))
            rounds.append({f"loss without block {index}": loss for index, loss in losses.items()})
    return dropped, rounds


def _by_angle(model: Model, sample: Any, remove: int, progress: Progress) -> tuple[list[int], list[dict[str, float]]]:
    total, tokens = torch.zeros(len(model.anatomy.blocks) - remove + 1, dtype=torch.float64), 0
    model.network.eval()
    for inputs, _ in progress.track(labelled_batches(model, sample), "scoring layers"):
        with torch.inference_mode():
            states = model.network(**inputs, output_hidden_states=True).hidden_states
        inside = inputs["attention_mask"].bool()
        distances = [angular_distance(states[low], states[low + remove])[inside] for low in range(len(total))]
        total += torch.stack([distance.sum() for distance in distances]).cpu()
        tokens += int(inside.sum())
    mean = total / tokens
    low = int(mean.argmin())
    return list(range(low, low + remove)), [
        {f"angle over blocks {start}–{start + remove - 1}": float(value) for start, value in enumerate(mean)}
    ]
