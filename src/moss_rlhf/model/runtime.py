"""Whatever answers a tokenized batch with logits: the network in PyTorch, or an exported file in its own runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Batch = Mapping[str, NDArray[np.int64]]


class Runtime(Protocol):
    """`name` is for people; `run` maps {input name: (batch, length)} to logits (batch, classes), float32."""

    name: str

    def run(self, batch: Batch) -> NDArray[np.float32]: ...


class TorchRuntime:
    """The network in PyTorch, as its weights are (float32), evaluation mode."""

    def __init__(self, network: object) -> None:
        import torch

        if not isinstance(network, torch.nn.Module):
            raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
        self.name = "PyTorch float32"
        self.network = network

    def run(self, batch: Batch) -> NDArray[np.float32]:
        import torch

        device = next(self.network.parameters()).device
        self.network.eval()
        with torch.inference_mode():
            inputs = {name: torch.from_numpy(value).to(device) for name, value in batch.items()}
            logits: NDArray[np.float32] = self.network(**inputs).logits.float().cpu().numpy()
        return logits


class OnnxRuntime:
    """An ONNX file in ONNX Runtime on the CPU. Inputs that the file does not name are left out."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or usable_cores()
        self.name = "ONNX Runtime"
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        outputs: list[NDArray[np.float32]] = self.session.run(None, {name: batch[name] for name in self.inputs})
        return outputs[0]


def usable_cores() -> int:
    """Cores this process may run on, which containers often make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
