"""The fields of `pretrain`. `stages.py` of the package hands them to the method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from moss_rlhf.recipe.finetuning import EarlyStoppingSpec
from moss_rlhf.recipe.spec import Positive, Share, Spec

Objective = Literal["masked", "causal", "spans", "infilling"]


OBJECTIVES: Mapping[str, tuple[Objective, ...]] = {
    "encoder": ("masked",),
    "decoder": ("causal",),
    "encoder-decoder": ("spans", "infilling"),
}
"""What each kind of network can learn; the first that suits its vocabulary is `auto`."""


class PretrainSpec(Spec):
    """Learn the language of plain texts, without labels; the body is kept, the task's head is put back."""

    texts: str = Field("task", description="'task' (the training texts) or a file: txt with one text a line, or `text`")
    objective: Literal["auto", "masked", "causal", "spans", "infilling"] = Field(
        "auto", description="auto: masked for encoders, causal for decoders, spans or infilling for encoder-decoders"
    )
    epochs: Annotated[int, Field(ge=0)] = Field(1, description="0: the stage changes nothing, for a search to try")
    learning_rate: float = Field(5e-5, gt=0, lt=1)
    mask: Share = Field(0.15, description="share of the tokens that are masked, or in spans")
    whole_words: bool = Field(True, description="masked: all pieces of a word or none")
    batch_size: Positive = 32
    max_length: Annotated[int, Field(ge=8)] = Field(256, description="tokens of a row, within the model's limit")
    packed: bool = Field(True, description="rows cut from all texts in a row; else every text begins its own")
    held_out: Share = Field(0.05, description="share of the texts that perplexity is measured on")
    head_first: float = Field(0.1, ge=0, lt=1, description="share of the steps in which a new head trains alone")
    schedule: Literal["linear", "slanted_triangular", "constant"] = "linear"
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises")
    weight_decay: float = Field(0.01, ge=0, description="decoupled (AdamW)")
    max_gradient_norm: float = Field(1.0, gt=0)
    layer_decay: float = Field(1.0, gt=0, le=1, description="each layer's rate is that of the next above × this")
    early_stopping: EarlyStoppingSpec | None = None
    evaluations_per_epoch: Positive = 1
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 autocast where the processor has it in hardware"
    )
