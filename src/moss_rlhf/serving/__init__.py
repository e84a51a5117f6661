"""Answers to raw texts, from a run, a checkpoint or a runtime file."""

from moss_rlhf.serving.predictor import Answer, Committee, Predictor

__all__ = ["Answer", "Committee", "Predictor"]
