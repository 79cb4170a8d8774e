"""Measurements: how good a model is, what it costs, how fast it runs."""

from slivo.measure.cost import Cost, cost
from slivo.measure.inspection import Inspection, inspect
from slivo.measure.latency import Timer, clock, latency
from slivo.measure.quality import agreement, confusion, predictions, quality

__all__ = [
    "Cost",
    "Inspection",
    "Timer",
    "agreement",
    "clock",
    "confusion",
    "cost",
    "inspect",
    "latency",
    "predictions",
    "quality",
]
