"""The page a person reads, and the lines that end a run."""

from moss_rlhf.reporting.page import render_page, write_page
from moss_rlhf.reporting.summary import terminal_summary

__all__ = ["render_page", "terminal_summary", "write_page"]
