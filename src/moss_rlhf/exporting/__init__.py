"""Runtime files: what is measured is what is shipped."""

from collections.abc import Mapping
from pathlib import Path

from moss_rlhf.exporting.compressed_tensors import export_compressed_tensors
from moss_rlhf.exporting.ctranslate2 import FILE as _CTRANSLATE2
from moss_rlhf.exporting.ctranslate2 import export_ctranslate2
from moss_rlhf.exporting.export import export
from moss_rlhf.exporting.onnx import FILE as _ONNX
from moss_rlhf.exporting.onnx import export_onnx

FILES: Mapping[str, Path] = {"onnx": Path("onnx") / _ONNX, "ctranslate2": Path("ctranslate2") / _CTRANSLATE2}
"""A format's weight file, in a run's directory."""

__all__ = ["FILES", "export", "export_compressed_tensors", "export_ctranslate2", "export_onnx"]
