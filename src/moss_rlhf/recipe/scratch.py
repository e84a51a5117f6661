"""A model that begins from nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from moss_rlhf.recipe.spec import Spec


class ScratchSpec(Spec):
    """A tokenizer learned from texts, and weights drawn by the seed: a body that a `pretrain` stage teaches to read."""

    config: dict[str, Any] = Field(description="as in config.json: model_type and the sizes of its family")
    texts: str = Field(description="what the tokenizer is learned from: txt with one text a line, or a column `text`")
    vocabulary: Annotated[int, Field(ge=8)] = Field(8000, description="most tokens, special ones included")
