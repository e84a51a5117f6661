"""Serve one batch in a fresh process and print its peak memory: `python -m moss_rlhf.probe ARTIFACT BATCH.npz`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from moss_rlhf.model.peak import own_peak
from moss_rlhf.model.runtime import OnnxRuntime, Runtime, TorchRuntime, open_ctranslate2


def open_artifact(artifact: Path) -> Runtime:
    """The runtime of an ONNX or CTranslate2 file, or a checkpoint directory; torch is imported for the last alone."""
    if artifact.suffix == ".onnx":
        return OnnxRuntime(artifact)
    if artifact.suffix == ".bin":
        return open_ctranslate2(artifact.parent)
    from moss_rlhf.tasks.loading import load

    return TorchRuntime(load(artifact).network)


if __name__ == "__main__":
    with np.load(sys.argv[2]) as batch:
        open_artifact(Path(sys.argv[1])).run(dict(batch))
    print(own_peak())
