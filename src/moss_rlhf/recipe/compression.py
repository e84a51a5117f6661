"""The fields of the compressing stages: each names its method's arguments, and `stages.py` hands them over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from moss_rlhf.recipe.pattern import parse_pattern
from moss_rlhf.recipe.spec import Positive, Removed, Share, Spec

CalibrationRows = Annotated[int, Field(ge=1, description="training rows that the network is measured on")]

OUTLIER_SPREAD = 0.08
"""How far allocation outliers moves a block's share to either side (Yin et al. 2023, arXiv:2310.05175, §3.3)."""
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The shares whose damage sensitivity measures."""


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
        if fault := narrowing_fault({name: getattr(self, name) for name in (*SHARES, *BUDGETS)}):
            raise PydanticCustomError("nothing", "{fault}", {"fault": fault})
        return self


SHARES = ("heads", "feed_forward", "hidden")
Budget = Literal["macs", "parameters", "latency"]
BUDGETS: tuple[Budget, ...] = ("macs", "parameters", "latency")


def narrowing_fault(shares: Mapping[str, float]) -> str | None:
    """One sentence where `narrow`'s shares and budgets, by name, do not go together, else None."""
    given = sorted(name for name, share in shares.items() if share)
    budgets = [name for name in given if name in BUDGETS]
    if not given:
        return "removes nothing; give heads or feed_forward a share above 0"
    if len(budgets) > 1 or (budgets and {"heads", "feed_forward"} & set(given)):
        return (
            f"{', '.join(name for name in given if name != 'hidden')} can't be met together; give shares of heads and "
            "feed_forward, or one of macs, parameters and latency"
        )
    return None


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
    similarity: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="merges: least mean cosine of the last states to the old ones (LaCo's threshold)"
    )
    rows: CalibrationRows = 512

    @model_validator(mode="after")
    def _similar(self) -> ShortenSpec:
        if fault := similarity_fault(self.similarity, self.how):
            raise PydanticCustomError("together", "{fault}", {"fault": fault})
        return self


def similarity_fault(similarity: float | None, how: str) -> str | None:
    """One sentence where `shorten`'s similarity has no merge to judge, else None."""
    if similarity is None or how != "drop":
        return None
    return f"similarity {similarity} is what merges must keep, and how is drop. Give a merge, or leave similarity out."


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
        try:
            parse_pattern(value)
        except ValueError:
            raise PydanticCustomError(
                "pattern", "give unstructured, N:M with N below M such as 2:4, or a block such as 4x1"
            ) from None
        return value

    @model_validator(mode="after")
    def _one_sparsity(self) -> PruneSpec:
        if (self.sparsity is None) != (":" in self.pattern):
            raise PydanticCustomError(
                "pattern", "give sparsity, such as 0.5, or a pattern N:M, which says it by itself"
            )
        if fault := pruning_fault(self.method, self.pattern, self.sparsity, self.scope, self.allocation):
            raise PydanticCustomError("together", "{fault}", {"fault": fault})
        return self


def pruning_fault(method: str, pattern: str, sparsity: float | None, scope: str, allocation: str) -> str | None:
    """One sentence where `prune`'s options do not go together, else None."""
    share = sparsity or 0.5
    faults = {
        "scope global is one threshold for all weights by magnitude: method magnitude, pattern unstructured, "
        "allocation uniform. Leave scope out, or these.": scope == "global"
        and (method, pattern, allocation) != ("magnitude", "unstructured", "uniform"),
        f"pattern {pattern} fixes every matrix's share. Leave allocation out.": ":" in pattern
        and allocation != "uniform",
        f"allocation outliers moves shares by up to {OUTLIER_SPREAD}, and around sparsity {sparsity} they would leave "
        f"[0, 1). Give a sparsity from {OUTLIER_SPREAD} to {0.99 - OUTLIER_SPREAD:.2f}.": allocation == "outliers"
        and not OUTLIER_SPREAD <= share < 1 - OUTLIER_SPREAD,
        f"allocation sensitivity knows what removing up to {SPARSITIES[-1]} of a matrix costs; sparsity {sparsity} is "
        f"more. Give at most {SPARSITIES[-1]}.": allocation == "sensitivity" and share > SPARSITIES[-1],
    }
    return next((fault for fault, holds in faults.items() if holds), None)


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
    """One sentence where `quantize`'s options do not go together, else None."""
    faults = {
        f"activation_order and sparsity are for method gptq, not {method}. Leave them out, or give gptq.": (
            method != "gptq" and bool(activation_order or sparsity)
        ),
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
