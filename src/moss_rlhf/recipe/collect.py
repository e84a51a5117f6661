"""The fields of `data.collect`: which texts of a corpus are the task's."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Name, Positive, Spec


class CollectSpec(Spec):
    """Of train, and of a share held out of it, only fitting texts stay: by likeness, words, perplexity; diverse."""

    count: Positive = Field(description="different texts that stay, at most; those of the held-out share among them")
    like: str | list[Name] | None = Field(
        None, description="example texts, or a file of them; the recipe's own model says how alike texts are"
    )
    keywords: list[Name] = Field(default_factory=list, description="a text must hold one of them")
    perplexity: str | None = Field(
        None, description="hub id or directory of a causal language model: the lower the perplexity, the better"
    )
    max_perplexity: float | None = Field(None, gt=1, description="texts above it are passed over")
    diversity: float = Field(0.3, ge=0, le=1, description="0: the best alone; 1: the farthest apart")

    @model_validator(mode="after")
    def _together(self) -> CollectSpec:
        if fault := collect_fault(self.like, self.keywords, self.perplexity is not None, self.max_perplexity):
            raise PydanticCustomError("together", "{fault}", {"fault": fault})
        return self


def collect_fault(like: object, keywords: Sequence[str], perplexity: bool, max_perplexity: float | None) -> str | None:
    """What of these can't go together, or says nothing, as one sentence; the same for a recipe and for Python."""
    faults = {
        "give at least one of like, keywords and perplexity": like is None and not keywords and not perplexity,
        "like: holds no example; give at least one text": isinstance(like, list | tuple) and not like,
        "keywords: an empty word is in every text": any(not word.strip() for word in keywords),
        "max_perplexity: needs perplexity, a causal language model": max_perplexity is not None and not perplexity,
        "max_perplexity: is needed where `like` ranks, or perplexity would change nothing": (
            perplexity and like is not None and max_perplexity is None
        ),
    }
    return next((f"{fault}." for fault, holds in faults.items() if holds), None)
