"""Runtime files: what is measured is what is shipped."""

from moss_rlhf.exporting.export import export
from moss_rlhf.exporting.onnx import export_onnx

__all__ = ["export", "export_onnx"]
