"""Optimizers by name, over groups of parameters that each have their rate and decay.

adamw       w ← w − η (m̂ / (√v̂ + ε) + λ w): the decay λ is decoupled (Loshchilov & Hutter 2019, arXiv:1711.05101).
adam        the gradient is g + λ w (Kingma & Ba 2015, arXiv:1412.6980): the decay passes through m and v, so weights of
            large gradients decay less. It is another thing than adamw's.
sgd         u ← μ u + g + λ w, w ← w − η u; the decay is L2's.
adafactor   v is kept as row and column means, and the step is cut to a root mean square of 1 (Shazeer & Stern 2018,
            arXiv:1804.04235), with the rate that it is given (no relative steps, no scaling by the weights); decoupled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from moss_rlhf.finetuning.options import Optimizer


def make_optimizer(options: Optimizer, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
    """An optimizer of `groups`, each with its own "lr" and "weight_decay"."""
    held = list(groups)
    if options.name == "adafactor":
        from transformers import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(held, lr=1.0, scale_parameter=False, relative_step=False)
        return adafactor
    # fused: one pass over weights, gradients and moments instead of a dozen
    if options.name == "sgd":
        momentum = 0.9 if options.momentum is None else options.momentum
        return torch.optim.SGD(held, momentum=momentum, fused=True)
    kind = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
    return kind(held, betas=options.betas or (0.9, 0.999), eps=options.epsilon or 1e-8, fused=True)
