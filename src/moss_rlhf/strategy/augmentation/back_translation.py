"""A text is translated into another language and back, which leaves its meaning and not its words.

Sennrich et al. 2016, arXiv:1511.06709 (for translation); Xie et al. 2020, arXiv:1904.12848, §3 (for classification).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.errors import ModelError
from moss_rlhf.model.config import KEY, read_config
from moss_rlhf.model.locate import locate
from moss_rlhf.strategy.augmentation.draws import Draws

_BATCH = 16
_LONGEST_GROWTH = 2  # tokens written for each token read: what runs on longer repeats itself


@dataclass(frozen=True)
class BackTranslation:
    """Two translators, the second of which reads the first one's language.

    beams         of the search; 1: the likeliest token each time.
    temperature   0: no sampling, so that every copy is the same; else tokens are sampled at it.
    """

    to: Any
    back: Any
    beams: int = 1
    temperature: float = 0.0

    def rewrite(self, texts: Sequence[str], draws: Sequence[Draws]) -> list[str]:
        """New texts in the order given; one that is too long for a translator, or comes back empty, stays as it is."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        found: dict[int, str] = {}
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            seed = draws[rows[0]].below(2**31)
            there = translate([texts[row] for row in rows], self.to, self.beams, self.temperature, seed)
            again = translate([text or " " for text in there], self.back, self.beams, self.temperature, seed)
            found |= {row: text for row, first, text in zip(rows, there, again, strict=True) if first and text}
        return [found.get(row, text) for row, text in enumerate(texts)]


def load_back_translation(to: str, back: str, beams: int = 1, temperature: float = 0.0) -> BackTranslation:
    """The pair of two checkpoints, plain ones or ours, by directory or hub id.

    raises   ModelError where one is missing or broken, or is no encoder-decoder.
    """
    return BackTranslation(_translator(to, "to"), _translator(back, "back"), beams, temperature)


def _translator(name: str, field: str) -> Any:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from moss_rlhf.model.checkpoint import load_pretrained

    model = load_pretrained(check_translator(name, field), "translation", AutoModelForSeq2SeqLM, None)
    model.network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    return model


def check_translator(name: str, field: str) -> Path:
    """The directory of an encoder-decoder; ModelError where there is none. No torch."""
    place = locate(name, f"data.augment.back_translation.{field}")
    config = read_config(place)
    task = config.get(KEY, {}).get("task", "translation")
    if not config.get("is_encoder_decoder") or task != "translation":
        raise ModelError(
            f"data.augment.back_translation.{field}: {name} is a {config['model_type']}, which translates nothing. "
            "Give a translation checkpoint, such as Helsinki-NLP/opus-mt-en-de (and opus-mt-de-en back)."
        )
    return place


def translate(texts: Sequence[str], model: Any, beams: int = 1, temperature: float = 0.0, seed: int = 0) -> list[str]:
    """Translations, in one batch; '' for a text longer than the model reads.

    seed   of the sampling, where the temperature is above 0. The generator of the caller is left as it was.
    """
    import torch

    tokenizer, limit = model.tokenizer, model.max_length
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    fitting = [row for row, ids in enumerate(encoded) if len(ids) <= limit]
    if not fitting:
        return [""] * len(texts)
    device = next(model.network.parameters()).device
    batch = tokenizer([texts[row] for row in fitting], padding=True, return_tensors="pt").to(device)
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    longest = min(limit - 1, _LONGEST_GROWTH * batch["input_ids"].shape[1] + 8)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        written = model.network.generate(**batch, num_beams=beams, max_new_tokens=longest, **sampling)
    found = dict(zip(fitting, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True))
    return [found.get(row, "").strip() for row in range(len(texts))]
