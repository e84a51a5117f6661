"""Rows worth training on: what is wrong with them is found, listed, and left out where that is asked for."""

from moss_rlhf.data.cleaning.clean import (
    Cleaned,
    Embed,
    Part,
    check_packages,
    clean_parts,
    clean_splits,
    kept_rows,
    refuse_rare_classes,
)
from moss_rlhf.data.cleaning.finding import Finding, Hit, write_findings

__all__ = [
    "Cleaned",
    "Embed",
    "Finding",
    "Hit",
    "Part",
    "check_packages",
    "clean_parts",
    "clean_splits",
    "kept_rows",
    "refuse_rare_classes",
    "write_findings",
]
