"""Runtime files: what is measured is what is shipped."""

from moss_rlhf.exporting.compressed_tensors import export_compressed_tensors
from moss_rlhf.exporting.export import export
from moss_rlhf.exporting.onnx import export_onnx

__all__ = ["export", "export_compressed_tensors", "export_onnx"]
