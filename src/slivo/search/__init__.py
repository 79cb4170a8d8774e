"""Search: recipes tried one after another, or by many workers at once, for those that nothing beats."""

from slivo.search.front import best, front
from slivo.search.record import Row
from slivo.search.study import Found, search

__all__ = ["Found", "Row", "best", "front", "search"]
