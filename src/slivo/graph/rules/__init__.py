"""What each ATen operator says about dimensions: one function an operator or a family of operators.

An operator that PyTorch tags as pointwise needs no rule here, nor does one that PyTorch writes in terms of
operators that have rules. Any other is unknown: everything that passes through it is fixed and reported.
"""

from slivo.graph.rules import (
    attention,
    control,
    convolution,
    create,
    index,
    layout,
    linear,
    norm,
    recurrent,
    reduce,
    select,
    window,
)

__all__ = [
    "attention",
    "control",
    "convolution",
    "create",
    "index",
    "layout",
    "linear",
    "norm",
    "recurrent",
    "reduce",
    "select",
    "window",
]
