"""Measurement: metrics with their uncertainty, speed, memory, and the machine all of it holds for."""

from moss_rlhf.evaluation.comparison import (
    Answers,
    ClassAnswers,
    TokenAnswers,
    WrittenAnswers,
    answer,
    calibration_of,
    changed,
    confusion_of,
    evaluate,
    fit_temperature,
    gain_of,
    metrics_of,
    moved,
    rewritten,
    sizes_of,
    temperature_of,
    translate,
)
from moss_rlhf.evaluation.machine import describe_machine, versions
from moss_rlhf.evaluation.memory import PeakMemory, peak_memory
from moss_rlhf.evaluation.speed import Speed, measure_speed, speed_batches
from moss_rlhf.evaluation.statistics import (
    Difference,
    Estimate,
    bootstrap,
    paired_difference,
)

__all__ = [
    "Answers",
    "ClassAnswers",
    "Difference",
    "Estimate",
    "PeakMemory",
    "Speed",
    "TokenAnswers",
    "WrittenAnswers",
    "answer",
    "bootstrap",
    "calibration_of",
    "changed",
    "confusion_of",
    "describe_machine",
    "evaluate",
    "fit_temperature",
    "gain_of",
    "measure_speed",
    "metrics_of",
    "moved",
    "paired_difference",
    "peak_memory",
    "rewritten",
    "sizes_of",
    "speed_batches",
    "temperature_of",
    "translate",
    "versions",
]
