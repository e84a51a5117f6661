"""Files or hub data sets → clean splits with a task's standard columns. Knows no tasks, models or tokenizers."""

from moss_rlhf.data.columns import Column
from moss_rlhf.data.layout import Sniffed, sniff
from moss_rlhf.data.scanning import open_splits
from moss_rlhf.data.splits import DataCheck, Splits, check_data, load_rows, load_splits
from moss_rlhf.data.texts import read_texts

__all__ = [
    "Column",
    "DataCheck",
    "Sniffed",
    "Splits",
    "check_data",
    "load_rows",
    "load_splits",
    "open_splits",
    "read_texts",
    "sniff",
]
