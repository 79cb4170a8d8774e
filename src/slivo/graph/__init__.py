"""The axis graph of a network: capture, inference of axes, surgery."""

from slivo.graph.axes import Axis, Graph, Member, trace
from slivo.graph.inputs import ExampleInputs, as_args
from slivo.graph.surgery import plan_attributes, plan_slices

__all__ = ["Axis", "ExampleInputs", "Graph", "Member", "as_args", "plan_attributes", "plan_slices", "trace"]
