"""The report: one page that says what a run did to a network, made from what the run wrote down."""

from slivo.report.page import write

__all__ = ["write"]
