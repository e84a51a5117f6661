"""Rows worth training on: what is wrong with them is found, listed, and left out where that is asked for."""

from moss_rlhf.data.cleaning.clean import Cleaned, Embed, check_packages, clean_splits
from moss_rlhf.data.cleaning.finding import Finding, Hit, write_findings

__all__ = ["Cleaned", "Embed", "Finding", "Hit", "check_packages", "clean_splits", "write_findings"]
