"""Pruning: choose what a model can spare (`criteria`), how much may stay (`budget`), and cut it (`width`)."""

from slivo.prune.budget import Budget, allocate
from slivo.prune.depth import drop, influence
from slivo.prune.importance import importance
from slivo.prune.plans import Plan
from slivo.prune.refit import reestimate, refit
from slivo.prune.schedule import steps
from slivo.prune.vocabulary import keep_tokens
from slivo.prune.width import cut, plan, prune, select

__all__ = [
    "Budget",
    "Plan",
    "allocate",
    "cut",
    "drop",
    "importance",
    "influence",
    "keep_tokens",
    "plan",
    "prune",
    "reestimate",
    "refit",
    "select",
    "steps",
]
