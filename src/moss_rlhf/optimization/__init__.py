"""One file a method: a pure function of tensors, and a thin driver that changes a model in place and returns facts."""

from moss_rlhf.optimization.magnitude import magnitude_mask
from moss_rlhf.optimization.narrow import narrow
from moss_rlhf.optimization.prune import prune
from moss_rlhf.optimization.quantize import quantize
from moss_rlhf.optimization.sensitivity import sensitivity
from moss_rlhf.optimization.shorten import shorten
from moss_rlhf.optimization.trim_vocabulary import trim_vocabulary

__all__ = ["magnitude_mask", "narrow", "prune", "quantize", "sensitivity", "shorten", "trim_vocabulary"]
