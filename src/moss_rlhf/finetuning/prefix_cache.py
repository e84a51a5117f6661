"""Frozen blocks: kept still while the rest trains, and where it pays, run once instead of every epoch.

While the lowest c blocks are frozen and in evaluation mode, what they give for a text never changes. It is computed
once, without a gradient, kept on disk without padding, and put in their place at every step until one of them thaws.
A frozen block without a cache is in evaluation mode too, so training with and without it is the same.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moss_rlhf.errors import MachineError
from moss_rlhf.finetuning.companions import Companion
from moss_rlhf.finetuning.layers import modules_of_groups
from moss_rlhf.finetuning.objective import ROW_COLUMNS
from moss_rlhf.finetuning.options import Cache
from moss_rlhf.finetuning.timetable import Timetable
from moss_rlhf.model.cost import Dimensions, prefix_flops
from moss_rlhf.model.prefix import Prefix
from moss_rlhf.model.stored_states import StoredStates, stored_bytes
from moss_rlhf.strategy import Run, cached_runs, frozen_blocks
from moss_rlhf.tasks import Task
from moss_rlhf.tasks.batching import by_length, chunks

_ROWS_AT_ONCE = 32  # in filling
_COMPARED = 4  # rows on which the network with stored states is held against the network itself
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}  # of logits, relative to the largest
_FREE = 0.9  # share of the free disk that a cache may take


class Still(Companion):
    """Frozen groups are in evaluation mode: no dropout where nothing is learned."""

    name = "still"

    def __init__(self, network: Any, groups: Sequence[str], timetable: Timetable) -> None:
        self.groups, self.timetable = tuple(groups), timetable
        self.parts = modules_of_groups(network)
        self._trains: dict[str, bool] = {}

    def before_step(self, step: int) -> None:
        self._trains = dict(zip(self.groups, self.timetable.trains(step), strict=True))

    def around(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        for group, module in self.parts:  # at every batch: Trainer puts the whole network in training mode before it
            module.train(self._trains[group])
        return nullcontext()


@dataclass(frozen=True)
class Rows:
    """The training rows as the cache sees them: fixed inputs, each with a name of its content.

    keys      one a row: equal for equal inputs.
    lengths   {column of token ids: tokens of each row}.
    """

    task: Task
    encoded: Any
    tokenizer: Any
    keys: list[str]
    lengths: dict[str, NDArray[np.int64]]

    @classmethod
    def of(cls, task: Task, encoded: Any, tokenizer: Any) -> Rows:
        columns = [name for name in task.padding(tokenizer) if name in encoded.column_names]
        ids = {name: encoded[name][:] for name in columns}
        keys = [_key(row) for row in zip(*ids.values(), strict=True)]
        lengths = {name: np.array([len(each) for each in values], dtype=np.int64) for name, values in ids.items()}
        return cls(task, encoded, tokenizer, keys, lengths)

    def in_stacks(self, stacks: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """{stack: tokens of each row in it}: a decoder beside an encoder reads the labels, shifted."""
        crossing = "labels" in self.lengths
        return {stack: self.lengths["labels" if crossing and stack == "decoder" else "input_ids"] for stack in stacks}

    def batch(self, positions: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        found = self.task.collate([self.encoded[position] for position in positions], self.tokenizer)
        return {name: value.to(device) for name, value in found.items()}


def _key(row: Sequence[Sequence[int]]) -> str:
    parts = (np.asarray(ids, dtype=np.int64) for ids in row)
    return hashlib.blake2b(b"|".join(part.tobytes() for part in parts), digest_size=16).hexdigest()


@dataclass(frozen=True)
class CachePlan:
    """What is kept, and where.

    runs      of steps, each with its own number of frozen blocks; none: nothing is kept.
    shared    whether others use the folder too, so that what is filled stays.
    required  whether it is an error where nothing can be kept after all.
    why_not   where there is something frozen that is not kept.
    """

    runs: tuple[Run, ...]
    dtype: torch.dtype
    folder: Path
    shared: bool = False
    required: bool = False
    why_not: str = ""


def plan_cache(
    options: Cache | None,
    frozen: Sequence[int],
    steps_per_epoch: int,
    *,
    bytes_of: Callable[[int, torch.dtype], int],
    bfloat16: bool,
    folder: Path,
    shared: bool,
    obstacle: str = "",
) -> CachePlan:
    """Which frozen blocks are run once.

    options    None: none.
    frozen     how many of the lowest blocks are frozen at each step.
    bytes_of   what the states under so many blocks take.
    bfloat16   whether training computes in it.
    obstacle   what speaks against any cache.
    raises     MachineError where it is required and can't be had.
    """
    dtype = _dtype(options, bfloat16)
    runs = tuple(cached_runs(frozen, steps_per_epoch, options.epochs)) if options else ()
    sizes = [bytes_of(run.blocks, dtype) for run in runs]
    why_not = obstacle if runs else ""
    if options and runs and not obstacle:
        why_not = _too_large(sum(sizes) if shared else max(sizes), options.bytes, folder)
    required = options is not None and options.required
    if options and required and (why_not or not runs):
        raise _refusal(why_not or f"no block stays frozen for {options.epochs:g} epochs")
    return CachePlan(() if why_not else runs, dtype, folder, shared, required, why_not)


def _refusal(reason: str) -> MachineError:
    return MachineError(f"finetune.cache: required, but {reason}. Give cache: auto to go on without.")


def _dtype(options: Cache | None, bfloat16: bool) -> torch.dtype:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    asked = "auto" if options is None else options.dtype
    return named.get(asked, torch.bfloat16 if bfloat16 else torch.float32)


def _too_large(size: int, bound: int, folder: Path) -> str:
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = int(shutil.disk_usage(existing).free * _FREE)
    if size > bound:
        return f"it would take {size / 1e9:.2f} GB and may take {bound / 1e9:.2f}"
    return f"it would take {size / 1e9:.2f} GB and the disk has room for {free / 1e9:.2f}" if size > free else ""


def states_bytes(rows: Rows, network: Any, blocks: int, hidden: int, dtype: torch.dtype) -> int:
    """What the states of all rows under so many blocks take on disk."""
    return stored_bytes(rows.in_stacks(list(Prefix(network, blocks).tops)), hidden, dtype)


class PrefixCache(Companion):
    """Runs the frozen blocks once for each run of steps in which they stay so, and answers for them from then on."""

    name = "prefix"

    def __init__(
        self, network: Any, dimensions: Dimensions, rows: Rows, plan: CachePlan, say: Callable[[str], None]
    ) -> None:
        self.network, self.dimensions, self.rows, self.plan, self.say = network, dimensions, rows, plan, say
        self.why_not = plan.why_not
        self._measured = torch.zeros(len(plan.runs), 2, dtype=torch.float64)  # bytes and seconds of each run
        self._run: Run | None = None
        self._prefix: Prefix | None = None
        self._store: StoredStates | None = None
        self._dtype = plan.dtype
        self._to_count = 0.0

    def before_step(self, step: int) -> None:
        run = next((run for run in self.plan.runs if run.start <= step < run.stop), None)
        if run is not self._run:
            self._leave()
            self._run = run
            if run is not None:
                self._enter(run, begins=step == run.start)

    def around(self, batch: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
        if self._store is None or self._prefix is None:
            return nullcontext()
        return self._prefix.answering(self._stored(batch["row"].tolist(), batch["input_ids"].device))

    def flops(self, length: int, tokens: int) -> float:
        if self._run is None or self._store is None:
            return 0.0
        filled, self._to_count = self._to_count, 0.0
        return filled - prefix_flops(self.dimensions, length, tokens, self._run.blocks)

    def state(self) -> Mapping[str, Tensor]:
        return {"measured": self._measured} if self.plan.runs else {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if "measured" in state:
            self._measured = state["measured"]

    def finish(self) -> dict[str, Any]:
        self._leave()
        if not self.plan.shared:
            shutil.rmtree(self.plan.folder, ignore_errors=True)
        size, seconds = self._measured.sum(dim=0).tolist()
        parts = [
            f"{run.blocks} blocks, steps {run.start + 1} to {run.stop}"
            for run, (stored, _) in zip(self.plan.runs, self._measured.tolist(), strict=True)
            if stored  # else early stopping came before it
        ]
        parts += [f"none: {self.why_not}"] if self.why_not else []
        return {"cache": "; ".join(parts) or "none", "cache_bytes": int(size), "cache_seconds": seconds}

    def _leave(self) -> None:
        """Forget a run's states; off the disk too where nobody else uses them."""
        if self._store is not None and not self.plan.shared:
            shutil.rmtree(self._store.folder, ignore_errors=True)
        self._store = self._prefix = None

    def _enter(self, run: Run, begins: bool) -> None:
        prefix = Prefix(self.network, run.blocks)
        sample = list(range(min(_COMPARED, len(self.rows.keys))))
        states = prefix.states(self._given(sample))
        some = next(iter(states.values()))
        self._dtype = some.dtype
        name = hashlib.sha256(f"{prefix.fingerprint()} {self.plan.dtype} {some.dtype} {self._autocast()}".encode())
        store = StoredStates(self.plan.folder / name.hexdigest()[:32], some.shape[-1], self.plan.dtype)
        with store.alone():
            missing = store.missing(self.rows.keys)
            try:
                self._fill(store, prefix, missing)
            except OverflowError as error:
                self._give_up(str(error))
                return
        self._prefix, self._store = prefix, store
        if not self._agrees(sample):
            self._leave()
            self._give_up("this network answers otherwise with stored states in the place of its blocks")
            return
        if begins:
            self._to_count = self._fill_flops(run.blocks, missing if self.plan.shared else range(len(self.rows.keys)))
        self._measured[self.plan.runs.index(run)] = torch.tensor([store.bytes, store.seconds], dtype=torch.float64)

    def _give_up(self, reason: str) -> None:
        if self.plan.required:
            raise _refusal(reason)
        self.why_not = reason
        self.say(f"  frozen blocks run at every step: {reason}")

    def _fill(self, store: StoredStates, prefix: Prefix, missing: Sequence[int]) -> None:
        if not missing:
            return
        self.say(f"  running {len(prefix.blocks)} frozen blocks once over {len(missing)} rows")
        started = time.monotonic()
        with store.adding() as part:
            for positions in self._in_batches(missing):
                states = prefix.states(self._given(positions))
                lengths = {stack: each[positions] for stack, each in self.rows.in_stacks(list(states)).items()}
                part.add([self.rows.keys[position] for position in positions], states, lengths)
            part.seconds = time.monotonic() - started

    def _in_batches(self, positions: Sequence[int]) -> Iterator[list[int]]:
        order = by_length(self.rows.lengths["input_ids"][list(positions)])
        return chunks(np.asarray(positions)[order], _ROWS_AT_ONCE)

    def _given(self, positions: Sequence[int]) -> dict[str, Tensor]:
        batch = self.rows.batch(positions, self._device)
        return self.rows.task.inputs(
            self.network, {name: value for name, value in batch.items() if name not in ROW_COLUMNS}
        )

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    def _autocast(self) -> bool:
        """Whether the network runs under autocast: the Trainer has wrapped its forward then."""
        return "forward" in vars(self.network)

    def _stored(self, positions: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        states = self._store.batch([self.rows.keys[position] for position in positions]) if self._store else {}
        return {stack: state.to(device=device, dtype=self._dtype) for stack, state in states.items()}

    @torch.no_grad()
    def _agrees(self, positions: Sequence[int]) -> bool:
        """Whether the network gives the same logits with stored states; of padding they may differ."""
        assert self._prefix is not None  # noqa: S101  # _enter has set it
        labels = self.rows.batch(positions, self._device)["labels"]
        given = self._given(positions)
        self.network.eval()
        whole = self.rows.task.at_targets(self.network(**given).logits, labels)
        with self._prefix.answering(self._stored(positions, self._device)):
            stored = self.rows.task.at_targets(self.network(**given).logits, labels)
        bound = _TOLERANCE[self.plan.dtype] * max(1.0, float(whole.abs().max()))
        return float((whole - stored).abs().max()) <= bound

    def _fill_flops(self, blocks: int, positions: Sequence[int]) -> float:
        lengths = self.rows.lengths["input_ids"][list(positions)]
        return sum(prefix_flops(self.dimensions, int(length), int(length), blocks) for length in lengths)


def frozen_at(timetable: Timetable, steps: int) -> list[int]:
    """How many of the lowest blocks are frozen at each step."""
    return [frozen_blocks(timetable.trains(step)) for step in range(steps)]
