"""Weights that stay on disk: one block at a time is in memory, however large the checkpoint.

safetensors maps a file into memory without reading it: the kernel fetches pages when they are used, and may drop them
again as long as nobody writes to them. So a network whose parameters are such maps costs (nearly) no memory. A block
that is to be changed is copied into memory for its visit, written to a file of its own, and mapped from there.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from moss_rlhf.model.anatomy import Block
from moss_rlhf.model.heap import give_back


class MappedWeights:
    """The blocks' weights on disk. Deleted with the object: save the model while it lives.

    folder   where the changed blocks go; as much space as the blocks need in float32. None: a temporary folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moss-weights-", dir=folder))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    @contextmanager
    def loaded(self, block: Block) -> Iterator[None]:
        """A block's parameters in memory, float32, for as long as they may change."""
        for parameter in block.module.parameters():
            parameter.data = parameter.data.to(torch.float32, copy=True)
        yield
        self._store(block)
        give_back()

    def _store(self, block: Block) -> None:
        parameters: dict[str, Any] = dict(block.module.named_parameters())
        file = self.folder / f"{block.name}.safetensors"
        partial = file.with_suffix(".partial")  # what is mapped now may be the older file
        save_file({name: parameter.data.contiguous() for name, parameter in parameters.items()}, partial)
        partial.replace(file)
        for name, tensor in load_file(file).items():
            parameters[name].data = tensor
