"""Everything that can be found wrong, or foretold, before any work: reads files, imports no torch."""

from moss_rlhf.checking.forecasts import Forecast
from moss_rlhf.checking.rows import (
    check_augmentation,
    check_clean_folds,
    check_folds,
    check_labels,
    check_rows,
    example_texts,
    operation_names,
    trains_on_copies,
)
from moss_rlhf.checking.shapes import check_budgets
from moss_rlhf.checking.source import source_of
from moss_rlhf.checking.stages import check_output, check_stages
from moss_rlhf.checking.whole import Check, check, check_candidates, settled

__all__ = [
    "Check",
    "Forecast",
    "check",
    "check_augmentation",
    "check_budgets",
    "check_candidates",
    "check_clean_folds",
    "check_folds",
    "check_labels",
    "check_output",
    "check_rows",
    "check_stages",
    "example_texts",
    "operation_names",
    "settled",
    "source_of",
    "trains_on_copies",
]
