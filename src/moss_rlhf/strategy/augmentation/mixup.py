"""Mixup: train on points between two examples, with targets between theirs.

Zhang et al. 2018, arXiv:1710.09412, on inputs; Verma et al. 2019, arXiv:1806.05236, on hidden states, which is the form
that texts allow (Chen et al. 2020, MixText, arXiv:2004.12239).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Mixed(NamedTuple):
    """A batch between itself and a shuffled copy of itself.

    hidden    (batch, …), weight · own + (1 − weight) · partner's
    targets   (batch, classes), probabilities, mixed likewise
    mask      (batch, length) or None: the places that either of both fills
    weight    (batch,), at least 1/2: the share of the row's own example
    partner   (batch,), int64: the row that each is mixed with
    """

    hidden: Tensor
    targets: Tensor
    mask: Tensor | None
    weight: Tensor
    partner: Tensor


def mixup(
    hidden: Tensor, targets: Tensor, alpha: float, generator: np.random.Generator, mask: Tensor | None = None
) -> Mixed:
    """Mix every row of a batch with another one's.

    λ ~ Beta(α, α), weight = max(λ, 1 − λ), so that a row stays nearest to itself (MixText, eq. 3):
    h̃ = weight · h + (1 − weight) · h[partner],   ỹ = weight · y + (1 − weight) · y[partner].
    Places that a row's mask leaves out count as zero vectors.

    hidden      (batch, …) float: hidden states (batch, length, features), or pooled ones.
    targets     (batch, classes) probabilities: one-hot labels, or a teacher's.
    alpha       above 0; small values keep most rows nearly as they are, 1 draws λ evenly.
    generator   of λ and of the pairs; equal generators give equal mixtures on every device.
    mask        (batch, length), which tokens are real: the attention mask.
    raises      ValueError on alpha ≤ 0, or batches of different sizes.
    """
    import torch

    if alpha <= 0:
        raise ValueError(f"alpha must be above 0, got {alpha}")
    if len(hidden) != len(targets):
        raise ValueError(f"hidden has {len(hidden)} rows and targets {len(targets)}")
    drawn = generator.beta(alpha, alpha, len(hidden))
    weight = torch.from_numpy(np.maximum(drawn, 1 - drawn)).to(hidden)
    partner = torch.from_numpy(generator.permutation(len(hidden))).to(hidden.device)
    if mask is not None:
        hidden = hidden * mask[..., None].to(hidden.dtype)
    return Mixed(
        _between(hidden, partner, weight),
        _between(targets, partner, weight.to(targets.dtype)),
        None if mask is None else torch.maximum(mask, mask[partner]),
        weight,
        partner,
    )


def _between(values: Tensor, partner: Tensor, weight: Tensor) -> Tensor:
    own = weight.reshape(-1, *[1] * (values.dim() - 1))
    return own * values + (1 - own) * values[partner]


def mixup_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with mixed targets, mean over the batch, float32: −Σ ỹ log softmax(logits).

    Linear in the targets, it equals weight · CE(own label) + (1 − weight) · CE(partner's label).

    logits, targets   (batch, classes).
    """
    from torch.nn.functional import log_softmax

    return -(targets.float() * log_softmax(logits.float(), dim=1)).sum(dim=1).mean()
