"""Pruning: choose what a model can spare (`criteria`), how much may stay (`budget`), and cut it (`width`)."""

from slivo.measure.budget import Budget
from slivo.prune.budget import allocate
from slivo.prune.control import Iterated, Trial, iterate
from slivo.prune.depth import drop, influence
from slivo.prune.importance import importance
from slivo.prune.merge import merge
from slivo.prune.oneshot import one_shot
from slivo.prune.plans import Plan
from slivo.prune.refit import reestimate, refit
from slivo.prune.schedule import steps
from slivo.prune.sparse.hold import hold
from slivo.prune.sparse.hooks import GradualSparsity, HoldMasks, SparsityBand
from slivo.prune.sparse.masks import sparsify, sparsity
from slivo.prune.sparse.permute import permute
from slivo.prune.surgeon import surgeon
from slivo.prune.vocabulary import keep_tokens
from slivo.prune.width import cut, plan, prune, select

__all__ = [
    "Budget",
    "GradualSparsity",
    "HoldMasks",
    "Iterated",
    "Plan",
    "SparsityBand",
    "Trial",
    "allocate",
    "cut",
    "drop",
    "hold",
    "importance",
    "influence",
    "iterate",
    "keep_tokens",
    "merge",
    "one_shot",
    "permute",
    "plan",
    "prune",
    "reestimate",
    "refit",
    "select",
    "sparsify",
    "sparsity",
    "steps",
    "surgeon",
]
