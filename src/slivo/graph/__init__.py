"""The axis graph of a network: capture, inference of axes, surgery."""

from slivo.graph.axes import Axis, Graph, Member, trace
from slivo.graph.inputs import Call, ExampleInputs, as_args
from slivo.graph.repair import settle
from slivo.graph.surgery import plan_slices

__all__ = ["Axis", "Call", "ExampleInputs", "Graph", "Member", "as_args", "plan_slices", "settle", "trace"]
