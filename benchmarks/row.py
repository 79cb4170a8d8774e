"""What the benchmark finds out about one network: a row of its table."""

from __future__ import annotations

from dataclasses import dataclass, field

LARGEST_ERROR = 1e-9
"""Largest permutation error, relative, that passes."""

MACS_KEPT = 0.51
"""Most that may be left when half of the MACs are asked for."""


@dataclass
class Row:
    """One network. None stands for what is not known, because the run did not come that far.

    Args:
        name: The source and the network, ``source/network``.
        kind: ``transformer`` if there is attention, ``cnn`` if convolutions look at neighbors, else ``other``.
        captured: Whether PyTorch captured it and slivo read the graph.
        params: Parameters.
        macs: Multiply-accumulates per sample, counted by operator as it runs.
        graph_macs: The same, as the graph counts them.
        axes: Number of axes, fixed ones included.
        prunable: Number of axes that may be cut.
        permutation: Largest relative error, in float64, when prunable axes are permuted.
        axis: The axis that has it.
        alone: Whether axes were permuted one by one; in groups otherwise (see `oracle.worst`).
        prunable_macs: Share of the MACs of operators in which a prunable axis takes part.
        prunable_params: Share of the parameters that lie on a prunable axis.
        macs_kept: Share of the MACs that is left by pruning to one half, counted by operator in the cut model.
        forward: Whether the cut model runs.
        backward: Whether the cut model trains: in training mode, all parameters that had a gradient have one.
        shapes: Whether all sizes that modules hold of themselves are those of their weights.
        interface: Whether outputs have the shapes and types from before, for the same inputs.
        graphs: Modules whose captured graph had to take the place of their own code; "" for the whole model.
        saved: Whether the cut model, saved and loaded again, is the same bit by bit.
        trace_seconds: Processor seconds for the graph alone.
        seconds: Processor seconds to trace, plan and cut, the checks that `slivo.prune` makes by running included.
        wall_seconds: The same by the clock on the wall.
        unknown: Operators without a rule, whose dimensions are fixed, and how often each occurs.
        step: What was being done last.
        steps: Processor seconds of each step of the check.
        failures: For each step that failed why.
        peer_seconds: Processor seconds that the peer took.
        peer_params: Share of the parameters that the peer left.
        peer_failure: Why the peer failed; "" if it passed.
    """

    name: str
    kind: str | None = None
    captured: bool | None = None
    params: int | None = None
    macs: int | None = None
    graph_macs: int | None = None
    axes: int | None = None
    prunable: int | None = None
    permutation: float | None = None
    axis: str = ""
    alone: bool | None = None
    prunable_macs: float | None = None
    prunable_params: float | None = None
    macs_kept: float | None = None
    forward: bool | None = None
    backward: bool | None = None
    shapes: bool | None = None
    interface: bool | None = None
    graphs: list[str] | None = None
    saved: bool | None = None
    trace_seconds: float | None = None
    seconds: float | None = None
    wall_seconds: float | None = None
    unknown: dict[str, int] = field(default_factory=dict)
    step: str = "start"
    steps: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    peer_seconds: float | None = None
    peer_params: float | None = None
    peer_failure: str | None = None

    @property
    def source(self) -> str:
        """Where the network comes from."""
        return self.name.partition("/")[0]

    @property
    def reasons(self) -> list[str]:
        """Why the network does not pass; empty if it does."""
        found = [f"{step}: {why}" for step, why in self.failures.items()]
        if self.permutation is not None and not self.permutation <= LARGEST_ERROR:
            found.append(f"permuting {self.axis!r} changes the outputs by {self.permutation:.1e}")
        if self.macs_kept is not None and self.macs_kept > MACS_KEPT:
            found.append(f"{self.macs_kept:.0%} of the MACs left")
        checks = ("captured", "forward", "backward", "shapes", "interface", "saved", "permutation", "macs_kept")
        if not found:
            found += [f"{each} not checked" for each in checks if getattr(self, each) is None]
        return found

    @property
    def passed(self) -> bool:
        """Whether there is nothing wrong."""
        return not self.reasons
