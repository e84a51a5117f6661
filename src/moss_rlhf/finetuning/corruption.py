"""What a language model is trained to restore: tokens masked, spans replaced, the next token. Pure functions of a row.

masked     a share of the tokens is chosen; of them 80 % become the mask token, 10 % a random one, 10 % stay, and
           all are foretold (Devlin et al. 2019, arXiv:1810.04805, §3.1). Whole words: all pieces of a word or none (the
           authors' later release; Cui et al. 2021, arXiv:1906.08101).
spans      runs of tokens are each replaced by one sentinel, and foretold as sentinel, tokens, …, last sentinel
           (Raffel et al. 2020, T5, arXiv:1910.10683, §3.1.4).
infilling  runs of tokens are each replaced by one mask token, and the whole text is foretold (Lewis et al. 2020, BART,
           arXiv:1910.13461, §2.2; its runs' lengths are Poisson, these are T5's).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]

_MASKED, _RANDOM = 0.8, 0.1  # of the chosen tokens


def chosen_tokens(starts: Flags, share: float, whole_words: bool, random: np.random.Generator) -> Flags:
    """Which tokens of a row are to be foretold: `share` of them, at least one, rounded to the nearest.

    starts   (tokens,) True where a word begins.
    With whole words, words are taken in random order while they fit into that number; at least one is taken.
    """
    count = len(starts)
    wanted = max(1, round(share * count))
    if not whole_words:
        chosen = np.zeros(count, dtype=np.bool_)
        chosen[random.permutation(count)[:wanted]] = True
        return chosen
    words = np.cumsum(starts) - starts[0]
    sizes = np.bincount(words)
    order = random.permutation(len(sizes))
    taken, total = [], 0
    for word in order:
        if total + sizes[word] <= wanted:
            taken.append(word)
            total += sizes[word]
    return np.isin(words, taken or order[:1])


def masked(ids: Ids, chosen: Flags, mask: int, words: Ids, random: np.random.Generator) -> Ids:
    """The row with its chosen tokens masked, replaced by one of `words`, or left: 80, 10 and 10 of a hundred."""
    draw = random.random(len(ids))
    replaced = np.where(chosen & (draw < _MASKED), mask, ids)
    at_random = chosen & (draw >= _MASKED) & (draw < _MASKED + _RANDOM)
    return np.where(at_random, random.choice(words, len(ids)), replaced)


def chosen_spans(length: int, share: float, mean: float, random: np.random.Generator) -> Flags:
    """(length,) True inside spans that hold `share` of the tokens, `mean` tokens each on average.

    Masked and unmasked runs alternate, unmasked first; how each kind is cut into runs is drawn evenly from all ways
    to cut it into runs of at least one (T5's own way, §3.1.4).
    raises   ValueError on fewer than two tokens, of which one must stay.
    """
    if length < 2:
        raise ValueError(f"spans need a row of at least 2 tokens, got {length}")
    noise = min(max(1, round(share * length)), length - 1)
    spans = min(max(1, round(noise / mean)), noise, length - noise)
    runs = np.stack([_cut(length - noise, spans, random), _cut(noise, spans, random)], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, runs)


def _cut(total: int, parts: int, random: np.random.Generator) -> Ids:
    """`total` as a sum of `parts` whole numbers of at least 1, every such sum as likely as the others."""
    cuts = np.sort(random.permutation(total - 1)[: parts - 1]) + 1
    sizes: Ids = np.diff(np.concatenate([[0], cuts, [total]]))
    return sizes


def spans_replaced(ids: Ids, chosen: Flags, sentinels: Sequence[int]) -> tuple[Ids, Ids]:
    """(input, target) of T5: each run of chosen tokens becomes one sentinel; the target holds what they stood for.

    "Thank you <X> me to your party <Y> week", "<X> for inviting <Y> last <Z>" (§3.1.4, figure 2).

    sentinels   one more than there are runs.
    """
    return _with_sentinels(ids, chosen, sentinels), _with_sentinels(ids, ~chosen, sentinels, closing=True)


def _with_sentinels(ids: Ids, gone: Flags, sentinels: Sequence[int], closing: bool = False) -> Ids:
    """Each run of what is gone becomes the next sentinel; `closing`: and one more stands at the end."""
    begins = gone & ~np.concatenate([[False], gone[:-1]])
    marks = np.asarray(sentinels)[np.maximum(np.cumsum(begins) - 1, 0)]
    kept = np.where(begins, marks, ids)[~gone | begins]
    return np.append(kept, sentinels[int(begins.sum())]) if closing and not gone[-1] else kept


def infilled(ids: Ids, chosen: Flags, mask: int) -> Ids:
    """The row with each run of chosen tokens replaced by one mask token."""
    begins = chosen & ~np.concatenate([[False], chosen[:-1]])
    shown: Ids = np.where(begins, mask, ids)[~chosen | begins]
    return shown
