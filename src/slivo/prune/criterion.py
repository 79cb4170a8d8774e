"""What a criterion is: a scoring function, what it is given, and how its scores compare."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Score = Callable[..., Tensor]
_GIVEN = (
    *("weights", "grads", "moved", "drawn", "inputs", "levels", "readers", "slopes", "units", "labels"),
    *("whole", "without"),
)


@dataclass(frozen=True)
class Criterion:
    """A scoring function and how it is to be applied.

    Args:
        score: To scores of shape (positions,), from any of these; parameters with defaults are its own options.

            - ``weights``: the axis matrix, shape (positions, entries);
            - ``grads``: the gradient of the loss on one batch, likewise;
            - ``drawn``: likewise the gradient of the log-likelihood of outputs that are drawn from the model's own
              distribution, summed over the batch and divided by √samples: no labels are needed;
            - ``inputs``: for each weight the sum of squares of the activation that it multiplies, likewise;
            - ``levels``: for each weight the mean magnitude of that activation in each batch, its square summed over
              the batches, likewise;
            - ``readers``: the weights that read the axis, with all second moments of what they read
              (`slivo.measure.readers.Reader`);
            - ``slopes``: the gradient of the loss, summed over the batches, laid out as each reader's weights;
            - ``moved``: the sum of −w·g over a short training on the batches, laid out as the axis matrix;
            - ``whole`` and ``without``: logarithms of the output's chances, and the same with each position masked;
            - ``units`` and ``labels``: the mean activation of each position on each sample, shape (positions,
              samples), and the samples' classes, shape (samples,).
        on: Which weights make up the axis matrix: ``all``; those that ``read`` the axis (the consumers); or the
            ``scale`` of the norms that lie on it. The gradient of a weight below a batch norm says nothing about its
            channel's size, because the norm undoes it; the consumers' gradient is that of the activation, weight for
            weight.
        relative: Whether scores of different axes are comparable only after division by their mean on the axis;
            True for magnitudes (a layer of small weights would be starved), False for estimates of the loss.
        taken: What has been taken beforehand, by name of the parameter and then of the weight, so that no batches are
            needed; None to take it when scores are asked for.
    """

    score: Score
    on: Literal["all", "read", "scale"]
    relative: bool
    taken: Mapping[str, Mapping[str, Tensor]] | None = field(default=None, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The function's name, which is the criterion's in recipes."""
        return getattr(self.score, "__name__", "custom")

    @property
    def given(self) -> tuple[str, ...]:
        """What the function is called with, by the names of its parameters; the first may have any name."""
        try:
            parameters = inspect.signature(self.score).parameters.values()
        except ValueError:  # functions of PyTorch's own may have no signature
            return ("weights",)
        named = [each.name for each in parameters if each.default is each.empty]
        return tuple(name if name in _GIVEN else "weights" for name in named[:1]) + tuple(named[1:])

    @property
    def needs_grads(self) -> bool:
        """Whether batches and a loss are needed."""
        return bool({"grads", "moved", "slopes"} & {*self.given}) and self.taken is None

    @property
    def needs_batches(self) -> bool:
        """Whether batches are needed."""
        return self.given != ("weights",) and self.taken is None

    @property
    def needs(self) -> str:
        """What the caller must give, in words."""
        if self.needs_grads:
            return "batches and a loss"
        if "labels" in self.given:
            return "batches with labels"
        return "batches" if self.needs_batches else "nothing"

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (inspect.getdoc(self.score) or "").partition("\n")[0]


def criterion(*, on: Literal["all", "read", "scale"] = "all", relative: bool = True) -> Callable[[Score], Criterion]:
    """Make a criterion of a scoring function; see `Criterion` for the arguments."""

    def wrap(score: Score) -> Criterion:
        return Criterion(score, on, relative)

    return wrap
