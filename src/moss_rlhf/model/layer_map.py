"""Which block of the teacher each block of the student learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from moss_rlhf.errors import ModelError
from moss_rlhf.model.anatomy import Anatomy, Origin

Layers = Literal["auto", "uniform", "last"] | Sequence[Sequence[int]]
Pair = tuple[int, int]


def uniform_map(student: int, teacher: int) -> list[Pair]:
    """Block i of `student` blocks with block ⌈(i + 1) · teacher / student⌉ − 1: the last with the last.

    (TinyBERT's g(m) where one number of blocks divides the other: Jiao et al. 2020, arXiv:1909.10351, §3.1.)
    """
    return [(index, -(-(index + 1) * teacher // student) - 1) for index in range(student)]


def origin_map(student: Sequence[Origin], teacher: Sequence[Origin]) -> list[Pair] | None:
    """Each block with the one that stood where it stood; None where the two were not cut from equally deep stacks,
    or the teacher lacks one of them.
    """
    at = {origin: position for position, origin in enumerate(teacher)}
    if not all(origin in at for origin in student):
        return None
    return [(position, at[origin]) for position, origin in enumerate(student)]


def layer_map(student: Anatomy, teacher: Anatomy, layers: Layers) -> list[Pair]:
    """[(student's layer, teacher's layer)], counted from 0: the encoder's first, then the decoder's.

    layers   auto: by where the blocks stood before any was dropped, else uniform; uniform; last: the last of each
             stack alone; or the pairs themselves.
    raises   ModelError where the two have other stacks, or a pair names no layer.
    """
    own, other = _stacks(student), _stacks(teacher)
    if own.keys() != other.keys():
        raise ModelError(
            f"finetune.distill: the student has {' and '.join(own)}, the teacher {' and '.join(other)}; their layers "
            "can't be paired. Leave hidden and attention at 0."
        )
    if not isinstance(layers, str):
        return _given(layers, own, other)
    pairs: list[Pair] = []
    starts = [0, 0]
    for name in own:
        found = _mapped(own[name], other[name], layers)
        pairs += [(starts[0] + one, starts[1] + two) for one, two in found]
        starts = [starts[0] + len(own[name]), starts[1] + len(other[name])]
    return pairs


def _mapped(student: Sequence[Origin], teacher: Sequence[Origin], layers: str) -> list[Pair]:
    uniform = uniform_map(len(student), len(teacher))
    if layers == "auto":
        return origin_map(student, teacher) or uniform
    return uniform if layers == "uniform" else uniform[-1:]


def _stacks(anatomy: Anatomy) -> Mapping[str, list[Origin]]:
    """Where every layer of each stack stood; ALBERT's one block is as many layers as it is gone through."""
    found: dict[str, list[Origin]] = {}
    for part in anatomy.family.stacks:
        blocks = anatomy.stack(part.name) * anatomy.repeats
        found[part.name] = [block.origin or Origin(index, len(blocks)) for index, block in enumerate(blocks)]
    return found


def _given(
    pairs: Sequence[Sequence[int]], own: Mapping[str, list[Origin]], other: Mapping[str, list[Origin]]
) -> list[Pair]:
    kinds = [[name for name, layers in stacks.items() for _ in layers] for stacks in (own, other)]
    for pair in pairs:
        refuse_pair(pair, len(kinds[0]), len(kinds[1]), "finetune.distill.layers")
        if kinds[0][pair[0]] != kinds[1][pair[1]]:
            raise ModelError(
                f"finetune.distill.layers: {list(pair)} pairs the {kinds[0][pair[0]]} with the {kinds[1][pair[1]]}. "
                "Pair layers of the same stack."
            )
    return [(pair[0], pair[1]) for pair in pairs]


def refuse_pair(pair: Sequence[int], student: int, teacher: int, field: str) -> None:
    """ModelError where a pair names a layer that is not there."""
    if len(pair) != 2 or not (0 <= pair[0] < student and 0 <= pair[1] < teacher):
        raise ModelError(
            f"{field}: {list(pair)} must be [student's layer, teacher's layer], counted from 0, below {student} and "
            f"{teacher}."
        )
