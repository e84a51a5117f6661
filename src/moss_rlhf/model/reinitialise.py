"""Draw the highest blocks anew, as their family does before pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import anatomy_of
from moss_rlhf.model.zeros import Zeros

_FROM_FILE = "_is_hf_initialized"  # transformers leaves alone whatever bears this mark


@torch.no_grad()
def draw_blocks(network: Any, blocks: int, seed: int, pruned: Sequence[nn.Parameter] = ()) -> None:
    """Re-initialise the `blocks` highest blocks, by the family's own rule (Zhang et al. 2020, arXiv:2006.05987, §5).

    Of an encoder-decoder these are the decoder's.

    pruned   parameters whose zeros stay.
    raises   ModelError where there are not as many blocks, or one block serves all layers.
    """
    anatomy = anatomy_of(network)
    if anatomy.family.shared:
        raise ModelError("reinitialise: the layers of this family share one block, so its top can't be drawn alone.")
    if blocks > len(anatomy.blocks):
        raise ModelError(f"reinitialise: {blocks} of {len(anatomy.blocks)} blocks; give at most {len(anatomy.blocks)}.")
    zeros = Zeros.of(pruned)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for block in anatomy.blocks[len(anatomy.blocks) - blocks :]:
            _forget_file(block.module)
            block.module.apply(network._init_weights)
    zeros.restore()


def _forget_file(module: nn.Module) -> None:
    for part in (*module.modules(), *module.parameters()):
        part.__dict__.pop(_FROM_FILE, None)
