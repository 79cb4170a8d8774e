"""Tasks: what data there is, what counts as good on it, and how a model is fed."""

from slivo.tasks.base import Batch, BatchSource, Split, Task, check, forward, loader
from slivo.tasks.classification import classification
from slivo.tasks.digits import digits
from slivo.tasks.factory import kinds, make

__all__ = [
    "Batch",
    "BatchSource",
    "Split",
    "Task",
    "check",
    "classification",
    "digits",
    "forward",
    "kinds",
    "loader",
    "make",
]
