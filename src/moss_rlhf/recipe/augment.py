"""The recipe's `data.augment`: changed copies of the training rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Positive, Share, Spec

Rate = Annotated[float, Field(ge=0, le=0.5)]
RATES = ("synonym", "insert", "swap", "delete", "typo", "keyboard", "punctuation")
"""The fields that are shares of a text's words, in the order in which they are applied."""


class MaskedLMSpec(Spec):
    """Words that a masked language model puts in the place of others."""

    model: str = Field(description="hub id or directory of a checkpoint with a masked-LM head")
    share: Share = Field(0.15, description="of the words that are replaced, at least one")
    top_k: Positive = Field(10, description="words that each place is sampled from")


class BackTranslationSpec(Spec):
    """Into another language and back."""

    to: str = Field(description="hub id or directory of a translation checkpoint")
    back: str = Field(description="the one that translates back")
    beams: Positive = 1
    temperature: float = Field(0.0, ge=0, description="0: the likeliest translation; else tokens are sampled at it")


class AugmentSpec(Spec):
    """Changed copies of the training rows, labels as they were. Rates are shares of a text's words."""

    copies: Positive = Field(1, description="of each training row, beside the row itself")
    synonym: Rate = Field(0.0, description="words replaced by a synonym (English, WordNet)")
    insert: Rate = Field(0.0, description="synonyms put in at random places (English, WordNet)")
    swap: Rate = Field(0.0, description="pairs of words that change places")
    delete: Rate = Field(0.0, description="words left out")
    typo: Rate = Field(0.0, description="words (Chinese: characters) with a slip of the pen")
    keyboard: Rate = Field(0.0, description="words with a neighbouring key pressed (QWERTY)")
    punctuation: Rate = Field(0.0, description="punctuation marks put in, at most, for each word (AEDA)")
    masked_lm: MaskedLMSpec | None = None
    back_translation: BackTranslationSpec | None = None
    combine: Literal["one", "all"] = Field(
        "one", description="one: each copy is made by one of the operations, drawn anew; all: by all of them in turn"
    )
    use: Literal["always", "distill"] = Field(
        "always", description="distill: only stages with a teacher train on the copies"
    )
    language: Literal["auto", "en", "zh", "other"] = Field(
        "auto", description="other: one that writes spaces; auto: zh where the letters are Chinese, else en"
    )

    @model_validator(mode="after")
    def _something(self) -> AugmentSpec:
        words = any(getattr(self, name) for name in RATES)
        if not words and self.masked_lm is None and self.back_translation is None:
            raise PydanticCustomError(
                "nothing", "changes nothing; give a rate above 0, such as swap: 0.1, or masked_lm or back_translation"
            )
        certain = self.back_translation is not None and self.back_translation.temperature == 0
        if self.copies > 1 and certain and not words and self.masked_lm is None:
            raise PydanticCustomError(
                "nothing",
                "{copies} copies would be the same; give back_translation a temperature, such as 0.8, or copies: 1",
                {"copies": self.copies},
            )
        return self
