"""What each removable unit is worth: heads of an attention, neurons of a feed-forward, features of the hidden size.

A *part* of a block (an attention or the feed-forward) ends in a matrix that reads its units side by side. Put a mask
m = 1 on every unit of what enters that matrix. Four scores, of which the lowest goes first:

    fisher      Σ_texts (∂loss / ∂m)²        the loss's rise to second order, Fisher information in the Hessian's place
                                             (Kwon et al. 2022, arXiv:2204.09656, §4.1)
    taylor      Σ_texts |∂loss / ∂m|         to first order (Molchanov et al. 2017, arXiv:1611.06440, §2.2)
    activation  √ Σ_tokens ‖unit's output‖²  (Muralidharan et al. 2024, arXiv:2407.14679, §2.2); no labels, no backward
    magnitude   ‖unit's columns of that matrix‖; no data
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Anatomy, Attention, Block, Matrix
from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.replay import Batch, calibrate
from moss_rlhf.model.surgery import keep_feed_forward, keep_heads
from moss_rlhf.progress import Progress
from moss_rlhf.tasks import TASKS

Score = Literal["fisher", "taylor", "activation", "magnitude"]
SCORES: tuple[Score, ...] = ("fisher", "taylor", "activation", "magnitude")
Kind = Literal["heads", "cross_heads", "feed_forward"]  # as BlockShape names them
KINDS: tuple[Kind, ...] = ("heads", "cross_heads", "feed_forward")


@dataclass(frozen=True)
class Part:
    """One part of a block whose units can go."""

    block: Block
    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.block.name}.{self.kind}"

    @property
    def attention(self) -> Attention | None:
        """None of a feed-forward."""
        return {"heads": self.block.attention, "cross_heads": self.block.cross_attention}.get(self.kind)

    @property
    def output(self) -> Matrix:
        """The matrix that reads the units."""
        return self.attention.output if self.attention else self.block.feed_forward.down

    @property
    def units(self) -> int:
        return self.attention.units if self.attention else self.block.feed_forward.width

    @property
    def unit_features(self) -> int:
        """Input features of `output` that one unit owns."""
        return self.attention.unit_features if self.attention else 1

    def keep(self, kept: Tensor) -> None:
        """Cut the part physically to the units `kept` (indices, int64, ascending)."""
        if self.attention:
            keep_heads(self.attention, kept.tolist())
        else:
            keep_feed_forward(self.block, kept)


def parts_of(anatomy: Anatomy) -> tuple[Part, ...]:
    """Every part of every block, in the order in which a block runs them."""
    return tuple(part for block in anatomy.blocks for part in block_parts(block))


def block_parts(block: Block) -> tuple[Part, ...]:
    crossing = (Part(block, "cross_heads"),) if block.cross_attention else ()
    return Part(block, "heads"), *crossing, Part(block, "feed_forward")


def groups_of(anatomy: Anatomy) -> tuple[tuple[Part, ...], ...]:
    """Parts that must keep the same units: one each, but all attentions of a kind in a stack that says `same_heads`."""
    groups: dict[tuple[str, ...], list[Part]] = {}
    for part in parts_of(anatomy):
        tied = anatomy.family.same_heads and part.attention is not None
        groups.setdefault((part.block.stack, part.kind) if tied else (part.name,), []).append(part)
    return tuple(tuple(group) for group in groups.values())


# --- from gradients ------------------------------------------------------------------------------------------------


def fisher_score(gradients: Tensor) -> Tensor:
    """Σ over texts of the squared gradients of the masks. gradients (texts, units); returns (units,) float64."""
    return gradients.double().square().sum(dim=0)


def taylor_score(gradients: Tensor) -> Tensor:
    """Σ over texts of the gradients' magnitudes. gradients (texts, units); returns (units,) float64."""
    return gradients.double().abs().sum(dim=0)


def mask_gradients(model: Model, batches: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
    """∂ loss of a text / ∂ mask of a unit, (texts, units) float32, by the parts' names.

    The loss is the sum over a text's labels (its tokens, of a language model), evaluation mode.
    raises   ModelError where a gradient is not finite.
    """
    task, parts = TASKS[model.task], parts_of(model.anatomy)
    found: dict[str, list[Tensor]] = {part.name: [] for part in parts}
    model.network.eval()
    for inputs, labels in progress.track(batches, "scoring units"):
        with torch.enable_grad(), masked(parts, len(labels), labels.device) as masks:
            loss = task.loss(model.network(**inputs).logits, labels, reduction="sum")
            gradients = torch.autograd.grad(loss, masks)
        for part, gradient in zip(parts, gradients, strict=True):
            found[part.name].append(gradient.float().cpu())
    return {name: _finite(torch.cat(gradients), name) for name, gradients in found.items()}


def _finite(values: Tensor, name: str) -> Tensor:
    if not values.isfinite().all():
        raise ModelError(
            f"narrow: the scores of {name} are not finite: the checkpoint holds inf or nan, or overflows. Fine-tune "
            "again with a lower learning rate, or fetch the checkpoint again."
        )
    return values


@contextmanager
def masked(parts: Sequence[Part], rows: int, device: torch.device) -> Iterator[list[Tensor]]:
    """Masks of ones, (rows, units) a part, that multiply what enters the parts' output matrices.

    One row of masks a text: its gradient is that text's own, so squares need no second pass.
    """
    masks = [torch.ones(rows, part.units, device=device, requires_grad=True) for part in parts]
    hooks = [_multiply_input(part, mask) for part, mask in zip(parts, masks, strict=True)]
    try:
        yield masks
    finally:
        for hook in hooks:
            hook.remove()


def _multiply_input(part: Part, mask: Tensor) -> Any:
    def multiply(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        values = inputs[0].reshape(len(mask), -1, inputs[0].shape[-1])  # OPT's down reads (rows · length, width)
        spread = mask.repeat_interleave(part.unit_features, dim=1)[:, None, :]
        return ((values * spread).reshape(inputs[0].shape),)

    return part.output.module.register_forward_pre_hook(multiply)


# --- without gradients ---------------------------------------------------------------------------------------------


def activation_scores(model: Model, batches: Sequence[Batch], progress: Progress) -> dict[str, Tensor]:
    """L2 norm over all tokens of what each unit hands on, (units,) float64, by the parts' names; padding left out."""
    scores = {}
    for visit in calibrate(model, batches, gather="norms", progress=progress, title="scoring units"):
        for part in block_parts(visit.block):
            squares = visit.statistics[part.output.name].squared_norm.cpu()
            scores[part.name] = squares.reshape(part.units, -1).sum(dim=1).sqrt()
    return scores


def magnitude_scores(anatomy: Anatomy) -> dict[str, Tensor]:
    """L2 norm of each unit's columns of the output matrix, (units,) float64, by the parts' names."""
    return {
        part.name: part.output.weight.detach().cpu().double().square().sum(dim=0).view(part.units, -1).sum(dim=1).sqrt()
        for part in parts_of(anatomy)
    }


def hidden_scores(model: Model, batches: Sequence[Batch], progress: Progress) -> Tensor:
    """What each feature of the hidden size carries, (hidden,) float64: its L2 norm over the tokens, summed over what
    enters the attentions and the feed-forwards, which are the norms' outputs (Muralidharan et al. 2024, §2.2).
    """
    total = torch.zeros(model.anatomy.hidden_size, dtype=torch.float64)
    for visit in calibrate(model, batches, gather="norms", progress=progress, title="scoring features"):
        for read in visit.block.parts:
            total += visit.statistics[read.matrices[0].name].squared_norm.sqrt().cpu()
    return total


def unit_scores(
    model: Model, batches: Sequence[Batch], score: Score, progress: Progress
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """(scores of every part's units, the gradients they were taken from: empty where no backward ran)."""
    if score == "magnitude":
        return magnitude_scores(model.anatomy), {}
    if score == "activation":
        return activation_scores(model, batches, progress), {}
    gradients, of = mask_gradients(model, batches, progress), {"fisher": fisher_score, "taylor": taylor_score}[score]
    return {name: of(values) for name, values in gradients.items()}, gradients
