"""The mean of several checkpoints of one training: flatter than any of them, and one network to serve.

Averaging the last ones (Polyak; Izmailov et al. 2018, arXiv:1803.05407) or the best ones (a soup; Wortsman et al. 2022,
arXiv:2203.05482, here of one run) costs a file an evaluation. The mean is kept only where validation says that it is no
worse than the best single checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model

from moss_rlhf.files import new_file
from moss_rlhf.finetuning.options import Averaging
from moss_rlhf.strategy import Judge

_PREFIX = "kept-"


def steps_to_average(log: Sequence[Mapping[str, float]], options: Averaging, judge: Judge) -> list[int]:
    """The evaluations whose weights are averaged, in order: the last `options.last`, or the best `options.best`."""
    steps = [int(entry["step"]) for entry in log if judge.sees(entry)]
    if options.last is not None:
        return steps[-options.last :]
    ranked = sorted((entry for entry in log if judge.sees(entry)), key=judge.rank, reverse=True)  # stable: the earlier
    return sorted(int(entry["step"]) for entry in ranked[: options.best])


def keep_for_average(network: Any, step: int, wanted: Sequence[int], folder: Path) -> None:
    """Write the weights of `step` where they are wanted, and drop those that no longer are."""
    if step in wanted:
        with new_file(_place(folder, step)) as partial:
            save_model(network, str(partial))
    for file in folder.glob(f"{_PREFIX}*.safetensors"):
        if int(file.stem.removeprefix(_PREFIX)) not in wanted:
            file.unlink()


def _place(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step}.safetensors"


@torch.no_grad()
def load_average(network: Any, steps: Sequence[int], folder: Path) -> None:
    """Put the mean of the kept weights into `network`; summed in float64, one file at a time."""
    sums: dict[str, torch.Tensor] = {}
    for step in steps:
        for name, tensor in load_file(_place(folder, step)).items():
            value = tensor.double() if tensor.is_floating_point() else tensor
            sums[name] = sums[name] + value if name in sums and tensor.is_floating_point() else value
    mean = {name: value / len(steps) if value.is_floating_point() else value for name, value in sums.items()}
    network.load_state_dict({name: value.to(_dtype(network, name)) for name, value in mean.items()}, strict=False)


def _dtype(network: Any, name: str) -> torch.dtype:
    found: torch.dtype = network.state_dict()[name].dtype
    return found
