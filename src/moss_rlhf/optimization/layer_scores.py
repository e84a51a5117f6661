"""How much blocks change what enters them: scores that need one forward pass and no labels.

With x_l the states that enter block l and x_{l+n} those that leave block l + n − 1, each the mean over all tokens:

    angular distance   arccos(cos(x_l, x_{l+n})) / π     Gromov et al. 2024, arXiv:2403.17887, §3.2
    block influence    1 − cos(x_l, x_{l+1})              Men et al. 2024 (ShortGPT), arXiv:2403.03853, eq. 1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Block, anatomy_of
from moss_rlhf.optimization.block_states import Batch, own_tokens, traced

Distance = Callable[[Tensor, Tensor], Tensor]


def _cosine(before: Tensor, after: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """Arccos of the cosine over π, in 0 … 1, of each token. before, after (…, hidden); returns (…) float64."""
    return torch.arccos(_cosine(before, after)) / math.pi


def block_influence(before: Tensor, after: Tensor) -> Tensor:
    """1 − cosine, in 0 … 2, of each token. before, after (…, hidden); returns (…) float64."""
    return 1 - _cosine(before, after)


def span_distances(
    network: Any, batches: Iterable[Batch], spans: Sequence[Sequence[int]], distance: Distance
) -> list[float]:
    """The mean distance, over tokens that are not padding, between what enters a span of blocks and what leaves it.

    spans    positions in `anatomy.blocks`, neighbours in one stack, in order.
    raises   ModelError where states are not finite.
    """
    anatomy = anatomy_of(network)
    totals, tokens = torch.zeros(len(spans), dtype=torch.float64), torch.zeros(len(spans), dtype=torch.int64)
    network.eval()
    for batch in batches:
        with torch.inference_mode(), traced(anatomy.blocks) as traces:
            network(**batch[0])
            for index, span in enumerate(spans):
                inside = own_tokens(anatomy, anatomy.blocks[span[0]], batch)
                found = distance(traces[span[0]].entered, traces[span[-1]].left)[inside]
                totals[index] += found.sum().cpu()
                tokens[index] += len(found)
    _refuse_infinite(totals, [anatomy.blocks[span[-1]] for span in spans])
    return (totals / tokens).tolist()


def _refuse_infinite(totals: Tensor, ends: Sequence[Block]) -> None:
    for total, block in zip(totals, ends, strict=True):
        if not total.isfinite():
            raise ModelError(
                f"shorten: what leaves {block.name} is not finite: the checkpoint holds inf or nan, or overflows. "
                "Fine-tune again with a lower learning rate, or fetch the checkpoint again."
            )
