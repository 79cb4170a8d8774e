"""The report: one page that says what a run did to a network, or a search found, made from what it wrote down."""

from slivo.report.page import write
from slivo.report.searches import write as write_search

__all__ = ["write", "write_search"]
