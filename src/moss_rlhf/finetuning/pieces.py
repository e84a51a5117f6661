"""One step in several pieces: a batch that does not fit into memory at once, with the gradient of the whole.

With n_p of a batch's n targets (rows, or tokens of a language model) in piece p, Σ_p n_p / n · loss_p is the loss of
the whole batch, and so is its gradient: batch 8 = 8 × 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moss_rlhf.errors import MachineError

Batch = Mapping[str, Tensor]
Targets = Callable[[Tensor], int]  # how many of these labels a mean loss counts


@dataclass
class Pieces:
    """How a batch is cut.

    rows   of a piece; None: the whole batch at once. It shrinks where memory does not suffice, and stays so.
    """

    rows: int | None = None

    def cut(self, batch: Batch, targets: Targets) -> Iterator[tuple[Batch, float]]:
        """Each piece with the share of the batch's targets that it holds."""
        count, whole = _rows(batch), targets(batch["labels"])
        size = min(self.rows or count, count)
        if size == count:
            yield batch, 1.0
            return
        for start in range(0, count, size):
            piece = {name: value[start : start + size] for name, value in batch.items()}
            yield piece, targets(piece["labels"]) / max(whole, 1)

    def halve(self, batch: Batch) -> None:
        """After a batch did not fit; MachineError where its pieces are single rows already."""
        size = min(self.rows or _rows(batch), _rows(batch))
        if size == 1:
            raise MachineError(
                f"finetune: one row of {batch['input_ids'].shape[1]} tokens does not fit into memory. Give a smaller "
                "data.max_length, gradient_checkpointing: true, or a smaller model."
            )
        self.rows = -(-size // 2)


def _rows(batch: Batch) -> int:
    return len(batch["labels"])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice: CUDA's, or the processor's allocator's."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def in_pieces(
    pieces: Pieces,
    batch: Batch,
    targets: Targets,
    backward: Callable[[Batch, float], Tensor],
    start_over: Callable[[int], None],
) -> Tensor:
    """The loss of a batch, its gradient accumulated by `backward(piece, share)`, which returns its share of the loss.

    start_over   called with the new number of rows of a piece after the old one did not fit: it drops the gradients.
    """
    while True:
        try:
            losses = [backward(piece, share) for piece, share in pieces.cut(batch, targets)]
            return torch.stack(losses).sum()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        pieces.halve(batch)
        start_over(pieces.rows or 0)
