"""The axis graph of a network: capture, inference of axes, surgery."""

from slivo.graph.axes import Axis, Graph, Member, trace
from slivo.graph.inputs import ExampleInputs, as_args

__all__ = ["Axis", "ExampleInputs", "Graph", "Member", "as_args", "trace"]
