"""Budgets: how much of a model may stay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from numbers import Integral

from slivo.errors import TargetError
from slivo.options import is_number, said

COUNTED = {"macs": "MACs", "params": "parameters", "bytes": "bytes"}
"""What a budget can say that is counted, and not measured; and how it is called."""


@dataclass(frozen=True)
class Budget:
    """What may stay of a model. Each entry but ``latency_ms`` is a share: a float above 0 and up to 1.0.

    What is counted may be given as an absolute count in its place: an int. If there are several entries, all of them
    are held.

    Args:
        macs: Multiply-accumulates per sample; a share or a count.
        params: Parameters; a share or a count.
        bytes: Bytes of the model's tensors, parameters and buffers in their dtypes, as a safetensors file; a share or
            a count. What `slivo.inspect` says and `slivo.save` writes.
        latency: Share of the time of one call, measured (`slivo.prune`).
        latency_ms: Milliseconds of one call, measured; in place of ``latency``.

    Raises:
        TargetError: If nothing is given, or a value is no share and no count.

    Example:
        >>> Budget(macs=0.5).limits({"macs": 1000, "params": 70})
        {'macs': 500}
        >>> Budget(macs=0.5, params=20).limits({"macs": 1000, "params": 70})
        {'macs': 500, 'params': 20}
    """

    macs: float | int | None = None
    params: float | int | None = None
    bytes: float | int | None = None
    latency: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise TargetError(
                "a budget needs macs=…, params=…, bytes=… or latency=…; a share (0.5 keeps half) or, but for latency, "
                "a count"
            )
        if self.latency is not None and self.latency_ms is not None:
            raise TargetError("a budget has latency, a share, and latency_ms, milliseconds; give one of them")
        for name, value in given.items():
            if name == "latency_ms":
                if not is_number(value) or not isfinite(value) or value <= 0:
                    raise TargetError(f"budget latency_ms is {said(value)}; milliseconds, a number above 0")
            elif name == "latency":
                if not is_number(value) or isinstance(value, Integral) or not 0 < value <= 1:
                    raise TargetError(
                        f"budget latency is {said(value)}; a share above 0 and up to 1.0 (0.5 halves the time), or "
                        "milliseconds as latency_ms=…"
                    )
            elif not is_number(value) or not (0 < value <= 1 or (value > 0 and isinstance(value, Integral))):
                raise TargetError(
                    f"budget {name} is {said(value)}; a share above 0 and up to 1.0 (0.5 keeps half) or a count, an int"
                )

    @property
    def timed(self) -> bool:
        """Whether there is a latency to keep to."""
        return self.latency is not None or self.latency_ms is not None

    def limits(self, whole: Mapping[str, int]) -> dict[str, int]:
        """Return the largest count allowed of each thing that is counted and that the budget speaks of.

        Args:
            whole: What the model has now: ``macs``, ``params`` and ``bytes``, as far as the budget speaks of them.

        Raises:
            TargetError: If it is to keep a share of nothing.
        """
        given = {name: getattr(self, name) for name in COUNTED}
        for name, share in given.items():
            if share is not None and not isinstance(share, Integral) and share < 1 and not whole[name]:
                raise TargetError(
                    f"the budget keeps {share} of the {COUNTED[name]}, but on these inputs the model has none; give "
                    f"{'params' if name == 'macs' else 'macs'}=… in its place"
                )
        return {
            name: int(value) if isinstance(value, Integral) else int(value * whole[name])
            for name, value in given.items()
            if value is not None
        }


def check_budget(keep: object) -> None:
    """Look whether something is a budget.

    Raises:
        TargetError: If it is not; says how one is written.

    Example:
        >>> check_budget(0.5)
        Traceback (most recent call last):
            ...
        slivo.errors.TargetError: keep is 0.5, no Budget; say what may stay of what: keep=Budget(macs=0.5)
    """
    if not isinstance(keep, Budget):
        share = keep if isinstance(keep, float) and 0 < keep <= 1 else 0.5
        raise TargetError(f"keep is {said(keep)}, no Budget; say what may stay of what: keep=Budget(macs={share})")
