"""Where a network answers: on the GPU while it is asked, where there is one with room for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SHARE = 0.4  # of the free memory for the weights: activations and statistics need the rest


@contextmanager
def on_accelerator(network: Any) -> Iterator[None]:
    """Hold a network on the GPU for as long as it lasts, and bring it back to where it was.

    Without a GPU, or where its weights take more than 40 % of the GPU's free memory, it stays where it is. Weights that
    are mapped from disk would be read into memory to come back, so callers leave such models out.
    """
    home = next(network.parameters()).device
    if home.type != "cpu" or not fits_accelerator(network):
        yield
        return
    network.to("cuda")
    try:
        yield
    finally:
        network.to(home)


def fits_accelerator(network: Any) -> bool:
    """Whether there is a GPU with room for the network's weights."""
    if not torch.cuda.is_available():
        return False
    free, _ = torch.cuda.mem_get_info()
    needed = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    return bool(needed <= _SHARE * free)
