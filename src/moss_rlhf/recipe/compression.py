"""The fields of the compressing stages: each names its method's arguments, and `stages.py` hands them over."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.spec import Positive, Removed, Share, Spec

CalibrationRows = Annotated[int, Field(ge=1, description="training rows that the network is measured on")]


class NarrowSpec(Spec):
    """Remove whole attention heads, feed-forward neurons or hidden features: physically smaller matrices."""

    heads: Removed = Field(0.0, description="share removed from every block")
    feed_forward: Removed = Field(0.0, description="share removed from every block")
    hidden: Removed = Field(0.0, description="share removed of the hidden size; needs fine-tuning afterwards")
    macs: Removed = Field(0.0, description="share of the blocks' multiply-accumulates removed, where it costs least")
    parameters: Removed = Field(0.0, description="share of the blocks' weights removed, where it costs least")
    latency: Removed = Field(0.0, description="share of the blocks' measured time removed, where it costs least")
    score: Literal["fisher", "taylor", "activation", "magnitude", "sensitivity"] = Field(
        "fisher", description="sensitivity: the Fisher scores that a sensitivity stage saved, no new pass"
    )
    steps: Positive = Field(1, description="cuts; scores are measured anew before each")
    repair: bool = Field(True, description="refit what remains to the uncut outputs, by least squares")
    rows: CalibrationRows = 1024
    multiple_of: Positive = Field(8, description="feed-forward widths are kept at multiples of this")

    @model_validator(mode="after")
    def _something(self) -> NarrowSpec:
        shares = {"heads", "feed_forward", "hidden"}
        budgets = {"macs", "parameters", "latency"}
        given = {name for name in shares | budgets if getattr(self, name)}
        if not given:
            raise PydanticCustomError("nothing", "removes nothing; give heads or feed_forward a share above 0")
        if len(given & budgets) > 1 or (given & budgets and given & {"heads", "feed_forward"}):
            raise PydanticCustomError(
                "nothing",
                "{names} can't be met together; give shares of heads and feed_forward, or one of macs, parameters and "
                "latency",
                {"names": ", ".join(sorted(given - {"hidden"}))},
            )
        return self


class ShortenSpec(Spec):
    """Remove whole layers."""

    remove: Positive = 1
    how: Literal["drop", "merge_average", "merge_collapse", "merge_least_squares", "auto"] = Field(
        "drop", description="auto: drops and merges are measured, and the better is kept"
    )
    score: Literal["loss", "angular", "block_influence", "sensitivity"] = Field(
        "loss",
        description="loss: what removing it costs; the others: how little it changes its input, sensitivity as saved",
    )
    stack: Literal["auto", "encoder", "decoder"] = Field("auto", description="which stack of an encoder-decoder")
    rows: CalibrationRows = 512


class PruneSpec(Spec):
    """Set single weights to zero; they stay zero in later fine-tuning. Makes nothing faster by itself."""

    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    sparsity: Share | None = Field(
        None, description="share of the blocks' weights that become zero; a pattern N:M says it by itself"
    )
    pattern: str = Field("unstructured", description="unstructured; N:M such as 2:4; block such as 4x1")
    scope: Literal["layer", "global"] = Field("layer", description="magnitude: one threshold a matrix, or one for all")
    allocation: Literal["uniform", "outliers", "sensitivity"] = Field(
        "uniform", description="outliers, sensitivity: blocks that need their weights keep more of them"
    )
    rows: CalibrationRows = 128

    @field_validator("pattern")
    @classmethod
    def _known(cls, value: str) -> str:
        if not re.fullmatch(r"unstructured|[1-9]\d?:[1-9]\d?|[1-9]\d{0,2}x[1-9]\d{0,2}", value):
            raise PydanticCustomError("pattern", "give unstructured, N:M such as 2:4, or a block such as 4x1")
        return value

    @model_validator(mode="after")
    def _one_sparsity(self) -> PruneSpec:
        if (self.sparsity is None) != (":" in self.pattern):
            raise PydanticCustomError(
                "pattern", "give sparsity, such as 0.5, or a pattern N:M, which says it by itself"
            )
        return self


class QuantizeSpec(Spec):
    """Put the weights on an integer grid, which the export realises exactly."""

    scheme: Literal["int8", "int8_static", "int4"] = Field(
        "int8", description="int8: activations at run time; int8_static: their ranges fixed; int4: weights only"
    )
    method: Literal["nearest", "gptq", "awq"] = Field(
        "nearest", description="gptq: later columns make up for errors; awq: features of large activations scaled up"
    )
    smooth: float = Field(
        0.0, ge=0, le=1, description="int8: SmoothQuant's alpha, how much of the activations' outliers the weights take"
    )
    group_size: Positive = Field(128, description="int4: weights of a row that share a scale")
    activation_order: bool | None = Field(None, description="gptq: columns of large activations first; on unless false")
    sparsity: Removed = Field(0.0, description="gptq: prune this share in the same pass (SparseGPT)")
    rows: CalibrationRows = 128

    @model_validator(mode="after")
    def _together(self) -> QuantizeSpec:
        fault = combination_fault(self.scheme, self.method, self.smooth, self.activation_order, self.sparsity)
        if fault:
            raise PydanticCustomError("together", "{fault}", {"fault": fault})
        return self


def combination_fault(
    scheme: str, method: str, smooth: float, activation_order: bool | None, sparsity: float
) -> str | None:
    """One sentence where `quantize`'s options do not go together or are out of range, else None."""
    faults = {
        f"activation_order and sparsity are for method gptq, not {method}. Leave them out, or give gptq.": (
            method != "gptq" and bool(activation_order or sparsity)
        ),
        f"sparsity must be in [0, 1), got {sparsity}. Give a share such as 0.5.": not 0 <= sparsity < 1,
        f"smooth must be in [0, 1], got {smooth}. Give a share such as 0.5.": not 0 <= smooth <= 1,
        "smooth evens out activations for int8 and int8_static; with int4 they stay in float. Leave it out.": (
            smooth > 0 and scheme == "int4"
        ),
        "smooth and method awq move the same scales for different ends. Give one of them.": (
            smooth > 0 and method == "awq"
        ),
    }
    return next((fault for fault, holds in faults.items() if holds), None)


class TrimVocabularySpec(Spec):
    """Keep the tokens that the texts of train and validation need."""

    corpora: list[str] = Field(
        default_factory=list, description="further text files, a text a line, whose tokens are kept; also .gz"
    )
    minimum_count: Positive = Field(
        1, description="tokens seen fewer times go; their texts are spelled in smaller ones"
    )
    keep: list[str] = Field(default_factory=list, description="words or texts that must encode as before")
    characters: Literal["all", "seen"] = Field("all", description="which one-character tokens stay")
    multiple_of: Positive = Field(8, description="the number of tokens is rounded up to this")


class SensitivitySpec(Spec):
    """Measure what each block and matrix would lose by each method; changes nothing."""

    rows: CalibrationRows = 256
