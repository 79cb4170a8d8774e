"""Train the values that weights share: each moves by the sum of its weights' gradients, and none leaves the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from slivo.edits.parametrized import parametrized
from slivo.errors import SlivoError
from slivo.share.cluster import shared
from slivo.train.hooks import Hook, TrainState


def numbers(model: nn.Module) -> dict[str, Tensor]:
    """Return for each shared weight which of its values each entry has, int64; zero has number 0.

    Numbers go on from group to group. Of weights that may not be trained, every entry has number 0.

    Raises:
        SlivoError: If the model shares no values.
    """
    said = shared(model)
    if not said:
        raise SlivoError("the model shares no values under the names of its record; call slivo.share first")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, one in said.items():
        weight, used = parameters[name].detach(), 1
        found[name] = torch.zeros_like(weight, dtype=torch.int64)
        for part, out in zip(weight.chunk(one.groups), found[name].chunk(one.groups), strict=True):
            there = part != 0
            values, number = torch.unique(part[there], return_inverse=True)
            if one.trained:
                out[there] = number + used
                used += len(values)
    return found


class TrainValues(Hook):
    """Train a model whose weights share values (`slivo.share`), and keep them shared.

    Before the optimizer's step the gradient of each weight becomes that of its value, the sum over all weights that
    have it; after the step, weights of one value are set to their mean, so that rounding does not part them. What is
    zero stays zero, and powers of two stay what they are. Give it before hooks that read gradients (`ClipGradients`)
    and after those that change weights (`EMA`).

    Args:
        reduce: ``sum`` is the gradient of the loss by the value. It is large where many weights share one: with SGD,
            lower the learning rate by as much, or take ``mean``, which is a step as large as that of single weights.
            AdamW takes either alike.

    Raises:
        SlivoError: When the training starts, if the model shares no values.

    Source: Han, Mao, Dally 2015, "Deep Compression", arXiv:1510.00149, section 3.3, eq. 3.

    Example:
        >>> from slivo.share import share
        >>> from slivo.train import OptimizerSpec, fit
        >>> small = share(nn.Linear(4, 4, bias=False), 3)
        >>> data = torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=4)
        >>> rows = fit(small, data, lambda net, x: {"loss": net(x).square().mean()}, epochs=2, hooks=[TrainValues()])
        >>> len(small.weight.unique())
        3
    """

    def __init__(self, reduce: Literal["sum", "mean"] = "sum") -> None:
        if reduce not in ("sum", "mean"):
            raise SlivoError(f"TrainValues reduce is {reduce!r}; sum or mean")
        self.reduce = reduce
        self.numbers: dict[str, Tensor] = {}
        self.start: dict[str, Tensor] = {}

    def on_fit_start(self, state: TrainState) -> None:
        """Take the values as they are."""
        if state.epoch == 0:
            self.numbers = numbers(state.model)
            parameters = dict(state.model.named_parameters(remove_duplicate=False))
            self.start = {name: parameters[name].detach().clone() for name in self.numbers}

    def on_gradients(self, state: TrainState) -> None:
        """Give each weight the gradient of its value."""
        parameters = dict(state.model.named_parameters(remove_duplicate=False))
        for name, number in self.numbers.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.copy_(_pooled(gradient.detach(), number, mean=self.reduce == "mean"))

    def on_step_end(self, state: TrainState) -> None:
        """Set the weights of one value to their mean, and what is not trained to what it was."""
        parameters = dict(state.model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, number in self.numbers.items():
                weight = parameters[name]
                weight.copy_(torch.where(number == 0, self.start[name], _pooled(weight, number, mean=True)))

    def on_fit_end(self, state: TrainState) -> None:
        """Put together again what another hook may have parted."""
        self.on_step_end(state)

    def state_dict(self) -> dict[str, Any]:
        """Return which weights share values, and those that are not trained."""
        return {"numbers": self.numbers, "start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up which weights share values."""
        self.numbers, self.start = state["numbers"], state["start"]


def _pooled(x: Tensor, number: Tensor, *, mean: bool) -> Tensor:
    """Return for each entry the sum or mean over all entries of its number, summed in float64; zero for number 0."""
    flat, at = x.double().flatten(), number.flatten()
    sums = flat.new_zeros(int(number.max()) + 1).index_add(0, at, flat)
    if mean:
        sums = sums / torch.bincount(at, minlength=len(sums)).clamp(min=1)
    return torch.where(number == 0, 0, sums[at].reshape(x.shape)).to(x.dtype)


class _Values(nn.Module):
    """Gives out a weight whose entries of one value are their mean."""

    number: Tensor
    rest: Tensor

    def __init__(self, weight: Tensor, number: Tensor) -> None:
        super().__init__()
        self.register_buffer("number", number, persistent=False)
        self.register_buffer("rest", torch.where(number == 0, weight, 0), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight; no gradient comes to what has number 0."""
        return torch.where(self.number == 0, self.rest, _pooled(weight, self.number, mean=True))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Take a weight as it is."""
        return weight


@contextmanager
def tied(model: nn.Module) -> Iterator[nn.Module]:
    """Have code of one's own train the values that weights share; for `slivo.train.fit` there is `TrainValues`.

    Within the block each shared weight is a parametrization (`torch.nn.utils.parametrize`): the weight that the
    network uses has for each value the mean over the entries that have it, and their gradients are the mean, too.
    After it the weights are plain parameters again, with the values in them. They are the same parameters all along,
    so that an optimizer may be made before the block or within it. Save the model after the block.

    Args:
        model: What `slivo.share` made, or one trained from it; it is changed, and given to the block.

    Raises:
        SlivoError: If the model shares no values, or is within such a block already.

    Example:
        >>> from slivo.share import share
        >>> small = share(nn.Linear(4, 4), 3)
        >>> adam = torch.optim.AdamW(small.parameters(), lr=0.1)
        >>> with tied(small):
        ...     small(torch.randn(8, 4)).square().mean().backward()
        ...     adam.step()
        >>> len(small.weight.unique())
        3
    """
    found = numbers(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with parametrized(model, {name: _Values(parameters[name].detach(), each) for name, each in found.items()}):
        yield model
