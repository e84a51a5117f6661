"""What can be shipped: a file or a directory, the model that it was made of, and the runtime that serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moss_rlhf.model.checkpoint import Model
from moss_rlhf.model.locate import weight_bytes
from moss_rlhf.model.runtime import OnnxRuntime, Runtime, TorchRuntime, open_ctranslate2


@dataclass(frozen=True)
class Artifact:
    """Something that can be shipped: where it is, its model (for sizes), and the runtime that serves it.

    rows   what it is measured on, where its tokenizer writes the same texts in other tokens.
    """

    path: Path
    model: Model
    runtime: Runtime
    rows: Any = None

    @property
    def bytes(self) -> int:
        return self.path.stat().st_size if self.path.is_file() else weight_bytes(self.path)


def torch_artifact(path: Path, model: Model, rows: Any = None) -> Artifact:
    return Artifact(path, model, TorchRuntime(model.network), rows)


def onnx_artifact(path: Path, model: Model, kind: str) -> Artifact:
    runtime = OnnxRuntime(path)
    runtime.name = f"ONNX Runtime {kind}"
    return Artifact(path, model, runtime)


def ctranslate2_artifact(path: Path, model: Model, kind: str) -> Artifact:
    """Of a directory's model.bin."""
    runtime = open_ctranslate2(path.parent, model.network.config.vocab_size)
    runtime.name = f"CTranslate2 {kind}"
    return Artifact(path, model, runtime)


ARTIFACTS: Mapping[str, Callable[[Path, Model, str], Artifact]] = {
    "onnx": onnx_artifact,
    "ctranslate2": ctranslate2_artifact,
}
"""Of a runtime's file, the model that it was made of, and its number format."""
