"""What each ATen operator says about dimensions: one function an operator or a family of operators.

An operator that PyTorch tags as pointwise needs no rule here. An operator with neither is unknown: everything that
passes through it is fixed and reported.
"""

from slivo.graph.rules import attention, control, convolution, create, layout, linear, norm, recurrent, reduce, select

__all__ = ["attention", "control", "convolution", "create", "layout", "linear", "norm", "recurrent", "reduce", "select"]
