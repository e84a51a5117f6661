"""Narrow the blocks: remove whole attention heads and feed-forward neurons, so that the matrices are smaller.

Units are scored by Fisher information of their masks (Kwon et al. 2022, arXiv:2204.09656, §4.1): put a mask m = 1
before the output projection of attention (one a head) and before the down projection (one a neuron); the diagonal of
the Fisher matrix is I_i = Σ_rows (∂loss / ∂m_i)², and removing the units of lowest I costs least to second order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Block
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.cost import units_kept
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads
from moss_rlhf.optimization.calibration import calibration_rows, labelled_batches
from moss_rlhf.progress import Progress
from moss_rlhf.tasks import TASKS
from moss_rlhf.tasks.loading import encoded


def keep_highest(score: Tensor, kept: int) -> Tensor:
    """Indices of the `kept` highest scores, ascending, int64; ties go to the lower index. score (units,)."""
    return score.argsort(descending=True, stable=True)[:kept].sort().values


def fisher_scores(model: Model, sample: Any, progress: Progress) -> list[tuple[Tensor, Tensor]]:
    """The Fisher score of every head, (heads,), and neuron, (feed_forward,), of each block; float64."""
    task, blocks = TASKS[model.task], model.anatomy.blocks
    totals = [
        (
            torch.zeros(block.attention.units, dtype=torch.float64),
            torch.zeros(block.shape.feed_forward, dtype=torch.float64),
        )
        for block in blocks
    ]
    model.network.eval()
    for inputs, labels in progress.track(labelled_batches(model, sample), "scoring units"):
        with _masks(blocks, len(labels), labels.device) as masks:
            loss = task.loss(model.network(**inputs).logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, [mask for pair in masks for mask in pair])
        for total, gradient in zip([total for pair in totals for total in pair], gradients, strict=True):
            total.add_(gradient.double().pow(2).sum(dim=0).cpu())
    return totals


@contextmanager
def _masks(blocks: Sequence[Block], rows: int, device: torch.device) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Masks of ones, (rows, heads) and (rows, feed_forward) a block, that multiply what enters o and down.

    One row of masks a text: its gradient is that text's own, so squares need no second pass.
    """
    masks, hooks = [], []
    for block in blocks:
        heads = torch.ones(rows, block.attention.units, device=device, requires_grad=True)
        neurons = torch.ones(rows, block.shape.feed_forward, device=device, requires_grad=True)
        hooks.append(_multiply_input(block.attention.output.module, heads, block.attention.unit_features))
        hooks.append(_multiply_input(block.feed_forward.down.module, neurons, 1))
        masks.append((heads, neurons))
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def _multiply_input(linear: nn.Module, mask: Tensor, features: int) -> Any:
    """Multiply the input (rows, length, units · features) of a layer by mask (rows, units)."""
    return linear.register_forward_pre_hook(
        lambda _, inputs: (inputs[0] * mask.repeat_interleave(features, dim=1)[:, None, :],)
    )


def narrow(
    model: Model,
    train: Any,
    *,
    heads: float = 0.0,
    feed_forward: float = 0.0,
    rows: int = 1024,
    multiple_of: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Remove the share `heads` of every block's heads and `feed_forward` of its neurons, in place; returns the facts.

    train         rows with labels; `rows` of them, drawn by `seed`, are scored on.
    multiple_of   feed-forward widths are rounded up to it: runtimes like multiples of 8 or 16.
    raises        ModelError on a quantized model, a share outside [0, 1), or one that removes nothing.
    """
    _refuse(model, heads, feed_forward)
    before = model.anatomy.shapes
    sample = calibration_rows(encoded(model, train), rows, seed)
    scores = fisher_scores(model, sample, progress or Progress(quiet=True))
    lost = []
    for block, (of_heads, of_neurons) in zip(model.anatomy.blocks, scores, strict=True):
        kept_heads = keep_highest(of_heads, units_kept(len(of_heads), heads))
        kept_neurons = keep_highest(of_neurons, units_kept(len(of_neurons), feed_forward, multiple_of))
        keep_heads(block.attention, kept_heads.tolist())
        keep_feed_forward(block, kept_neurons)
        lost.append({"heads": 1 - _share(of_heads, kept_heads), "feed_forward": 1 - _share(of_neurons, kept_neurons)})
    after = model.anatomy.shapes
    if after == before:
        raise ModelError(
            f"narrow: heads {heads} and feed_forward {feed_forward} are less than one unit of {before[0]}. "
            "Remove a larger share."
        )
    return {
        "heads": f"{before[0].heads} → {after[0].heads} a block",
        "feed_forward": f"{before[0].feed_forward} → {after[0].feed_forward} a block",
        "rows_scored": len(sample),
        "score_lost": lost,
        "faster_here": "yes: every matrix of the blocks is physically smaller",
    }


def _share(score: Tensor, kept: Tensor) -> float:
    return float(score[kept].sum() / score.sum()) if score.sum() > 0 else 1.0


def _refuse(model: Model, heads: float, feed_forward: float) -> None:
    if model.quantization:
        raise ModelError("narrow: the model is quantized already; narrow it before, then quantize.")
    for name, share in (("heads", heads), ("feed_forward", feed_forward)):
        if not 0 <= share < 1:
            raise ModelError(
                f"narrow: {name} is the share removed and must be in [0, 1), got {share}. Give a share such as 0.5."
            )
