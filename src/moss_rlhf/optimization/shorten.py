"""Shorten a stack: drop whole blocks, or merge neighbours into one.

`score` says which. `loss` measures what each possible step costs and takes the cheapest, one block at a time;
`angular` and `block_influence` (see `layer_scores`) need one forward pass and no labels; `sensitivity` reads the
influence that `model.sensitivity` holds of this very network, and needs none. `how` says what becomes of
them (see `merging`); `stack_search` puts the two together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Anatomy
from moss_rlhf.model.checkpoint import Model, takes_model
from moss_rlhf.model.damage import after_shortening
from moss_rlhf.model.limits import depth_fault, shortening_fault
from moss_rlhf.optimization.calibration import calibration_rows, compare_speed, labelled_batches, mean_loss
from moss_rlhf.optimization.sensitivity import current_table
from moss_rlhf.optimization.soundness import refuse_not_finite
from moss_rlhf.optimization.stack_search import Found, Way, loss_of, search
from moss_rlhf.progress import Progress
from moss_rlhf.recipe.compression import ShortenSpec, similarity_fault
from moss_rlhf.recipe.options import follows
from moss_rlhf.tasks.loading import encoded

How = Literal["drop", "merge_average", "merge_collapse", "merge_least_squares", "auto"]
Score = Literal["loss", "angular", "block_influence", "sensitivity"]
WhichStack = Literal["auto", "encoder", "decoder"]

_HELD_OUT = 4  # every fourth row, where ways are compared


@takes_model
@follows(ShortenSpec, "shorten")
def shorten(
    model: Model,
    train: Any,
    *,
    remove: int = 1,
    how: How = "drop",
    score: Score = "loss",
    stack: WhichStack = "auto",
    similarity: float | None = None,
    rows: int = 512,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Take `remove` blocks out of the network, in place; returns the facts: which, how, and every candidate's score.

    train        rows of the task; `rows` of them, drawn by `seed`, are measured on.
    score        sensitivity: the blocks' `drop` in `model.sensitivity`, measured first where there is none of this very
                 network.
    how          auto: every way is tried on three quarters of the rows; the one of lowest loss on the rest is kept.
    stack        of an encoder-decoder: the one that loses blocks; auto: both may, the score decides.
    similarity   the least mean cosine, in (0, 1], that merges must keep between the network's last states and the old
                 ones (LaCo's threshold). None: no limit.
    raises       RecipeError on an option that a recipe could not hold;
                 ModelError on a quantized model or shared layers, where no block would stay, where blocks can't be
                 merged, or where no merge is as similar as asked for. The model is as it was then.
    """
    _refuse(model, remove, how=how, score=score, stack=stack, similarity=similarity)
    anatomy = model.anatomy
    sample = calibration_rows(encoded(model, train, judged=True), rows, seed)
    progress = progress or Progress(quiet=True)
    influence, source = dict[str, float](), dict[str, object]()
    if score == "sensitivity":
        table, source = current_table(model, train, rows=rows, seed=seed, progress=progress)
        influence = {name: float(scores["drop"]) for name, scores in table["blocks"].items()}
    if how == "auto":
        found, facts = _best_way(
            model,
            sample,
            remove,
            score=score,
            stack=stack,
            similarity=similarity,
            influence=influence,
            progress=progress,
        )
    else:
        found = search(Way(model, how, stack, sample, similarity), remove, score, progress, influence)
        facts = {"loss": loss_of(found.way, found.groups, sample), "rows_scored": len(sample)}
    speed = _speed(found, sample)
    told = _facts(anatomy, found, score)
    masks = found.way.commit(found.groups)
    survivors = _survivors(anatomy, found)
    model.sensitivity = after_shortening(model.sensitivity, survivors)
    return told | facts | masks | source | {"measured": speed}


def _speed(found: Found, sample: Any) -> str:
    """The network as it is against the shortened one, in turns."""
    way, network = found.way, found.way.model.network
    network.eval()
    batches = list(labelled_batches(way.model, sample))
    return compare_speed(network, network, batches, lambda: way.applied(found.groups))


def _survivors(anatomy: Anatomy, found: Found) -> dict[str, list[str]]:
    """{name of a block now: its old name, then those of the blocks that went and that it must make up for}.

    Who makes up for a dropped block is the one above it, which gets another input now; the last one, where there is
    none above.
    """
    stays = found.way.realised(found.groups)[0]
    after: dict[str, list[str]] = {}
    for stack in anatomy.family.stacks:
        kept = [index for index in stays if anatomy.blocks[index].stack == stack.name]
        names = [block.name for block in anatomy.stack(stack.name)]
        owners = {index: [anatomy.blocks[index].name] for index in kept}
        for index, block in enumerate(anatomy.blocks):
            if block.stack == stack.name and index not in kept:
                owners[_heir(found, kept, index)].append(block.name)
        after |= {names[position]: owners[index] for position, index in enumerate(kept)}
    return after


def _heir(found: Found, kept: Sequence[int], gone: int) -> int:
    """Position of the block that a merge put `gone` into, else of the next one above, else of the last."""
    group = next((group for group in found.groups if gone in group), ())
    return next((index for index in kept if index in group or (not group and index > gone)), kept[-1])


def _best_way(
    model: Model,
    sample: Any,
    remove: int,
    *,
    score: str,
    stack: str,
    similarity: float | None,
    influence: Mapping[str, float],
    progress: Progress,
) -> tuple[Found, dict[str, object]]:
    """Search by every way on some rows, and keep the one that loses least on the others."""
    held_out, scored = _split(sample)
    losses: dict[str, float] = {}
    impossible: dict[str, str] = {}
    found: dict[str, Found] = {}
    for how in (name for name in get_args(How) if name != "auto"):
        try:
            _refuse_count(model.anatomy, remove, how, score, stack)
            threshold = None if how == "drop" else similarity
            found[how] = search(Way(model, how, stack, scored, threshold), remove, score, progress, influence)
            losses[how] = loss_of(found[how].way, found[how].groups, held_out)
        except ModelError as error:
            impossible[how] = str(error)
    if not losses:
        raise ModelError(impossible["drop"])
    best = min(losses, key=lambda how: losses[how] if math.isfinite(losses[how]) else math.inf)
    facts: dict[str, object] = {"loss": losses[best], "candidates": losses, "loss_before": mean_loss(model, held_out)}
    facts |= {"rows_scored": len(scored), "rows_held_out": len(held_out)}
    return found[best], facts | ({"impossible": impossible} if impossible else {})


def _split(sample: Any) -> tuple[Any, Any]:
    """(held out, the rest): every fourth row, lengths alike; one row alone serves as both."""
    held_out = sample.select(range(0, len(sample), _HELD_OUT))
    rest = sample.select([index for index in range(len(sample)) if index % _HELD_OUT])
    return held_out, rest if len(rest) else held_out


# --- what is refused, and what is told -----------------------------------------------------------------------------


def _refuse(model: Model, remove: int, *, how: str, score: str, stack: str, similarity: float | None) -> None:
    if model.quantization:
        raise ModelError("shorten: the model is quantized already; shorten it before, then quantize.")
    refuse_not_finite(model, "shorten")
    anatomy = model.anatomy
    scaled = bool(getattr(model.network.config, "scale_attn_by_inverse_layer_idx", False))
    if fault := depth_fault(shared=anatomy.family.shared, scaled_by_layer=scaled):
        raise ModelError(f"shorten: {fault}")
    if fault := similarity_fault(similarity, how):
        raise ModelError(f"shorten: {fault}")
    _refuse_count(anatomy, remove, how, score, stack)


def _refuse_count(anatomy: Anatomy, remove: int, how: str, score: str, stack: str) -> None:
    """ModelError where so many blocks can't go."""
    layers = {str(part.name): len(anatomy.stack(part.name)) for part in anatomy.family.stacks}
    first_stays = anatomy.family.first_stays
    if fault := shortening_fault(remove, layers, stack=stack, how=how, score=score, first_stays=first_stays):
        raise ModelError(f"shorten: {fault}")


def _facts(anatomy: Anatomy, found: Found, score: str) -> dict[str, object]:
    merged = {group: found.way.merged(group) for group in found.groups if len(group) > 1}
    kept = found.way.realised(found.groups)[0]
    gone = [index for index in range(len(anatomy.blocks)) if index not in kept]
    facts: dict[str, object] = {
        "removed": f"{len(gone)} of {len(anatomy.blocks)} blocks",
        "layers": _depths(anatomy, gone),
        "how": found.way.how,
        "dropped": gone,
        "score": score,
        "scores": found.scores,
    }
    if merged:
        facts["merged"] = {
            part.base.name: [anatomy.blocks[index].name for index in group] for group, part in merged.items()
        }
    errors = {part.base.name: part.error for part in merged.values() if part.error is not None}
    return facts | ({"fit_error": errors} if errors else {}) | {"faster_here": _faster(anatomy, gone)}


def _depths(anatomy: Anatomy, gone: Sequence[int]) -> str:
    stacks = [part.name for part in anatomy.family.stacks]
    lost = {name: sum(anatomy.blocks[index].stack == name for index in gone) for name in stacks}
    depths = {name: f"{len(anatomy.stack(name))} → {len(anatomy.stack(name)) - lost[name]}" for name in stacks}
    if len(stacks) == 1:
        return depths[stacks[0]]
    return ", ".join(f"{name} {depth}" for name, depth in depths.items())


def _faster(anatomy: Anatomy, gone: Sequence[int]) -> str:
    said = f"{len(gone)} of {len(anatomy.blocks)} blocks are not computed any more"
    if len(anatomy.family.stacks) > 1 and all(anatomy.blocks[index].stack == "encoder" for index in gone):
        return f"a little: {said}, but all in the encoder, which runs once a text, and the decoder once a token"
    return f"yes: {said}"
