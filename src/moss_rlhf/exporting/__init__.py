"""Runtime files: what is measured is what is shipped."""

from moss_rlhf.exporting.onnx import export_onnx

__all__ = ["export_onnx"]
