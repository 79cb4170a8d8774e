"""Options as callers give them, looked at before anything takes time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral

from torch import Tensor

from slivo.errors import SlivoError, TargetError


def said(value: object) -> str:
    """Return a value as it is written, or its type if that would be long.

    Example:
        >>> said(0.5), said([0] * 100)
        ('0.5', 'of type list')
    """
    written = repr(value)
    return written if len(written) <= 40 else f"of type {type(value).__name__}"


def check_batches(batches: object) -> None:
    """Look whether something is batches, and not one batch.

    Raises:
        SlivoError: If it is not.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | str | Mapping):
        raise SlivoError(f"batches is {said(batches)}; give a list of batches or a loader, as batches=[batch]")


def check_widths(min_width: object, round_to: object) -> None:
    """Look whether the least width is a share or a count, and the multiple a count.

    Raises:
        TargetError: If either is not.
    """
    if isinstance(round_to, bool) or not isinstance(round_to, Integral) or int(round_to) < 1:
        raise TargetError(f"round_to is {said(round_to)}; an int of at least 1 (8 makes widths multiples of 8)")
    count = isinstance(min_width, Integral) and not isinstance(min_width, bool) and int(min_width) >= 0
    if not count and not (isinstance(min_width, float) and 0 <= min_width <= 1):
        raise TargetError(
            f"min_width is {said(min_width)}; a share from 0.0 to 1.0 (0.1 is a tenth) or a count, an int"
        )


def listed(given: Sequence[str] | str, what: str) -> tuple[str, ...]:
    """Return names or globs as a tuple; one that stands alone is one, not its characters.

    Raises:
        SlivoError: If there is anything but strings.

    Example:
        >>> listed("layer1.*", "only"), listed(["a", "b"], "only")
        (('layer1.*',), ('a', 'b'))
    """
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence | set) else (given,)
    for name in names:
        if not isinstance(name, str):
            raise SlivoError(f"{what} holds {said(name)}; give names or globs, as {what}=['layer1.*']")
    return names
