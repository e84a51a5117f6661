"""Words that a masked language model puts in the place of others: its own choice among what fits the sentence.

Contextual augmentation (Kobayashi 2018, arXiv:1805.06201), without a condition on the label: a share of a text's words
is masked, all at once, and each mask is filled by sampling from the model's top k words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_rlhf.errors import ModelError
from moss_rlhf.model.config import position_limit, read_config
from moss_rlhf.model.locate import locate
from moss_rlhf.strategy.augmentation.draws import Draws
from moss_rlhf.strategy.augmentation.operations import changes
from moss_rlhf.strategy.augmentation.words import FREE, Language, parts, split_characters, split_spaced

if TYPE_CHECKING:
    from torch import Tensor

_FIELD = "data.augment.masked_lm.model"
_HEADS = ("ForMaskedLM", "ForPreTraining")  # how the classes are named whose head foretells masked words
_BATCH = 32
_WORD_STARTS = ("Ġ", "▁")  # how byte-pair and unigram vocabularies mark a piece that begins a word


@dataclass(frozen=True)
class MaskedWords:
    """A masked language model and how it is used.

    network, tokenizer   in evaluation mode; the network gives logits (batch, length, vocabulary).
    share                of a text's words (Chinese: characters) that are masked, at least one.
    top_k                words that each mask is sampled from, by their probability.
    """

    network: Any
    tokenizer: Any
    share: float
    top_k: int
    language: Language

    def rewrite(self, texts: Sequence[str], draws: Sequence[Draws]) -> list[str]:
        """New texts in the order given; each depends on its own draws, whatever batch it is in."""
        masked = [_mask(text, self, own) for text, own in zip(texts, draws, strict=True)]
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        answers = dict(self._answers(masked, order))
        return [_fill(masked[row], *answers[row], self.top_k, draws[row]) for row in range(len(texts))]

    def _answers(self, masked: Sequence[Masked], order: Sequence[int]) -> Iterator[tuple[int, Answer]]:
        """(row, (words, probabilities) of its masks' candidates), batches of similar lengths."""
        words = word_pieces(self.tokenizer, self.language)
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            answers = foretell([masked[row].text for row in rows], self.network, self.tokenizer, words, self.top_k + 1)
            yield from zip(rows, answers, strict=True)


Answer = tuple[list[list[str]], list[list[float]]]


@dataclass(frozen=True)
class Masked:
    """A text's words, the positions that are masked, rising, and the text with masks in their place."""

    words: list[str]
    positions: list[int]
    text: str


def load_masked_words(model: str, share: float, top_k: int, language: Language) -> MaskedWords:
    """The model of a checkpoint with a head for masked words, by directory or hub id.

    raises   ModelError where it is missing or broken, or has no such head.
    """
    import torch
    from transformers import AutoModelForMaskedLM

    from moss_rlhf.model.checkpoint import load_tokenizer

    place = check_masked_model(model)
    try:
        network, info = AutoModelForMaskedLM.from_pretrained(
            place, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{_FIELD}: {place} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    if info["missing_keys"]:
        raise ModelError(
            f"{_FIELD}: {place} lacks {min(info['missing_keys'])}, so its words would be drawn by chance. "
            "Give a checkpoint that was saved with its masked-LM head."
        )
    network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return MaskedWords(network, load_tokenizer(place), share, top_k, language)


def check_masked_model(model: str) -> Path:
    """The directory of a checkpoint that names a masked-LM head; ModelError where there is none. No torch."""
    place = locate(model)
    classes = read_config(place).get("architectures") or ["(none)"]
    if not any(name.endswith(_HEADS) for name in classes):
        raise ModelError(
            f"{_FIELD}: {model} is a {', '.join(classes)}, which has no head that foretells masked words. Give a "
            "masked language model, such as bert-base-uncased (its config.json names …ForMaskedLM)."
        )
    return place


def _mask(text: str, model: MaskedWords, draws: Draws) -> Masked:
    words = (split_characters if model.language == "zh" else split_spaced)(text)
    positions = sorted(draws.positions(words, FREE[model.language], changes(model.share, len(words))))
    shown = list(words)
    for position in positions:
        before, _, after = parts(words[position])
        shown[position] = before + str(model.tokenizer.mask_token) + after
    return Masked(words, positions, "".join(shown))


def word_pieces(tokenizer: Any, language: Language) -> list[str]:
    """(vocabulary) the word that a token is when it stands alone; '' where it is none: special, a part, no letters."""
    tokens: list[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special, free = set(tokenizer.all_special_tokens), FREE[language]
    start = next((mark for mark in _WORD_STARTS if sum(token.startswith(mark) for token in tokens[:5000]) > 1), "")

    def word(token: str) -> str:
        whole = token not in special and (language == "zh" or token.startswith(start)) and not token.startswith("##")
        plain = token.removeprefix(start)
        usable = whole and plain.isalpha() and plain.isascii() != (language == "zh") and free(plain)
        return plain if usable and (language != "zh" or len(plain) == 1) else ""

    return [word(token) if token is not None else "" for token in tokens]


def foretell(texts: Sequence[str], network: Any, tokenizer: Any, words: Sequence[str], count: int) -> list[Answer]:
    """For each text, for each of its masks in order: the `count` likeliest words and their probabilities.

    A text longer than the model reads is cut, and the masks behind the cut have no answer.
    """
    import torch

    limit = position_limit(network.config.to_dict(), tokenizer.model_max_length)
    batch = tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
    batch = batch.to(next(network.parameters()).device)
    usable = torch.tensor([bool(word) for word in words], device=batch["input_ids"].device)
    masks = batch["input_ids"] == tokenizer.mask_token_id
    with torch.inference_mode():
        logits = network(**batch).logits[masks][:, : len(words)].float()
    best = logits.masked_fill(~usable, -torch.inf).softmax(dim=1).topk(min(count, int(usable.sum())), dim=1)
    return _by_text(best.values, best.indices, masks.sum(dim=1).tolist(), words)


def _by_text(values: Tensor, indices: Tensor, counts: Sequence[int], words: Sequence[str]) -> list[Answer]:
    answers, start = [], 0
    for count in counts:
        names = [[words[token] for token in row] for row in indices[start : start + count].tolist()]
        answers.append((names, values[start : start + count].tolist()))
        start += count
    return answers


def _fill(masked: Masked, names: list[list[str]], shares: list[list[float]], top_k: int, draws: Draws) -> str:
    words = list(masked.words)
    for position, found, weights in zip(masked.positions, names, shares, strict=False):  # the text may have been cut
        before, core, after = parts(words[position])
        pairs = [pair for pair in zip(found, weights, strict=True) if pair[0].casefold() != core.casefold()][:top_k]
        if pairs:
            words[position] = before + _sample(pairs, draws) + after
    return "".join(words)


def _sample(pairs: Sequence[tuple[str, float]], draws: Draws) -> str:
    """One of the words, each with its probability."""
    left = draws.share() * sum(weight for _, weight in pairs)
    for word, weight in pairs:
        left -= weight
        if left < 0:
            return word
    return pairs[-1][0]
