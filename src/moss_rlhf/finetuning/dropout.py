"""Dropout at the speed of memory, on a processor, and the attention around it.

PyTorch draws a number for every element from one stream, which takes 11 ns an element here: in a MiniLM that reads 256
tokens, half of a training step goes into the masks of its attentions. This module draws 64 random bits at a time and
spends 16 on an element. The share that is dropped is rounded to 1/65536, and what stays is scaled by exactly that
share. Masks follow from PyTorch's generator, so a seed gives the same bits, and a resumed training goes on with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_LEVELS = 1 << 16
_LOWEST = -1e30
_SHORT = 512  # tokens


def kept(shape: Sequence[int], threshold: int, dtype: torch.dtype) -> Tensor:
    """A mask: 1 with probability 1 − threshold / 65536, else 0; drawn by a seed from PyTorch's generator."""
    size = math.prod(shape)
    seed = int(torch.randint(1 << 62, ()))
    drawn = np.random.Generator(np.random.SFC64(seed)).integers(1 << 64, size=-(-size // 4), dtype=np.uint64)
    values = torch.from_numpy(drawn.view(np.int16)[:size])
    return torch.ge(values, threshold - _LEVELS // 2, out=torch.empty(size, dtype=dtype)).view(*shape)


def dropout(values: Tensor, share: float) -> Tensor:
    """Each element is 0 with probability `share`, in (0, 1), rounded to 1/65536; the others are scaled up for it."""
    threshold = _threshold(share)
    return values * kept(values.shape, threshold, values.dtype).mul_(_scale(threshold))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What `torch.nn.functional.scaled_dot_product_attention` gives, whose arguments these are, with quick masks."""
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        # not −inf: of a row without any token, all would be nan
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros(attn_mask.shape, dtype=scores.dtype).masked_fill_(~attn_mask, _LOWEST)
        scores = scores + attn_mask
    threshold = _threshold(dropout_p)
    weights = scores.softmax(dim=-1, dtype=scores.dtype)
    if threshold == 0:
        return weights @ value
    return (weights * kept(weights.shape, threshold, weights.dtype)) @ (value * _scale(threshold))


@contextmanager
def quick_dropout() -> Iterator[None]:
    """While it holds, every module's dropout on a processor is done by this module, and that of PyTorch's attention.

    The functions themselves are replaced, for the whole process: a torch function mode would not be there when a
    checkpointed block is computed again inside of `backward`.
    """
    own = {name: getattr(functional, name) for name in _STAND_INS}
    try:
        for name, stand_in in _STAND_INS.items():
            setattr(functional, name, partial(stand_in, own[name]))
        yield
    finally:
        for name, function in own.items():
            setattr(functional, name, function)


def _dropout(
    own: Callable[..., Tensor], input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if training and not inplace and _drops(input, p):
        return dropout(input, p)
    return own(input, p, training, inplace)


def _attention(
    own: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    **given: Any,
) -> Tensor:
    chosen = attention if _drops(query, dropout_p) or _outruns_flash(query, key) else own
    return chosen(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, **given)


_STAND_INS: Mapping[str, Callable[..., Tensor]] = {"dropout": _dropout, "scaled_dot_product_attention": _attention}


def _outruns_flash(query: Tensor, key: Tensor) -> bool:
    """Whether plain products beat PyTorch's fused kernel, which in bfloat16 with a gradient takes 3 to 4 times as long
    on 26 and 128 tokens, half as long again on 256; beyond 512 its small memory counts more.
    """
    learns = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    short = max(query.shape[-2], key.shape[-2]) <= _SHORT
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and learns and short


def _drops(values: Tensor, share: float) -> bool:
    return values.device.type == "cpu" and 0 < _threshold(share) < _LEVELS


def _threshold(share: float) -> int:
    return round(share * _LEVELS)


def _scale(threshold: int) -> float:
    return _LEVELS / (_LEVELS - threshold)
