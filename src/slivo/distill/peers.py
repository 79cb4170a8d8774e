"""Models that teach each other or themselves while they train: mutual, joint, and deeper-teaches-shallower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.utils import _pytree as pytree

from slivo.distill import features, logits
from slivo.distill._maps import average, exact
from slivo.distill._tensors import classes_last, logits_of, positive
from slivo.distill._tensors import weight as check_weight
from slivo.distill.adapt import adapter, channels
from slivo.distill.objective import attended
from slivo.distill.taps import tap
from slivo.errors import RecipeError, SlivoError
from slivo.graph.capture import evaluating

Batch = Any
Forward = Callable[[nn.Module, Batch], Any]
Loss = Callable[[Any, Batch], Tensor]
Teaches = Literal["all", "first"]


def mutual(
    task_forward: Forward,
    task_loss: Loss,
    *,
    temperature: float = 1.0,
    weight: float = 1.0,
    teaches: Teaches = "all",
    class_dim: int | None = None,
) -> Callable[[nn.Module, Batch], dict[str, Tensor]]:
    """Return an objective by which several models learn together, each from the labels and from the others.

    Args:
        task_forward: ``(model, batch)`` to a model's output.
        task_loss: ``(output, batch)`` to a scalar.
        temperature: Of the divergence between models.
        weight: Of the mean divergence from the others.
        teaches: ``all``, or ``first``: the first model learns from labels alone and teaches the others while it learns
            (joint training of teacher and student).
        class_dim: Which dimension of the outputs holds the classes: 1 for (batch, classes, height, width). None for the
            last; of outputs of more than three dimensions it must be said.

    Returns:
        A callable ``(models, batch)`` to terms by name for `slivo.train.fit` or any loop; ``models`` is an
        `torch.nn.ModuleList` of two or more. All run in the mode they are in, and no gradient flows into who teaches.

    Raises:
        RecipeError: If an option makes no sense.

    Lᵢ = CE(zᵢ, y) + weight / (K − 1) Σⱼ T² KL(softmax(zⱼ / T) ‖ softmax(zᵢ / T)).

    Source: Zhang, Xiang, Hospedales, Lu 2017, "Deep Mutual Learning", arXiv:1706.00384, eq. 9.

    Example:
        >>> models = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
        >>> def forward(model, batch):
        ...     return model(batch[0])
        >>> def loss(output, batch):
        ...     return nn.functional.cross_entropy(output, batch[1])
        >>> sorted(mutual(forward, loss)(models, (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))))
        ['kd.0', 'kd.1', 'labels.0', 'labels.1']
    """
    _check(temperature, weight)
    if teaches not in get_args(Teaches):
        raise RecipeError(f"teaches is {teaches!r}; allowed: {', '.join(get_args(Teaches))}")

    def objective(models: nn.Module, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(models, nn.ModuleList) or len(models) < 2:
            raise SlivoError(f"models that learn together are a ModuleList of two or more, not {type(models).__name__}")
        outputs = [task_forward(model, batch) for model in models]
        said = [classes_last(logits_of(output), class_dim) for output in outputs]
        parts = {f"labels.{at}": task_loss(output, batch) for at, output in enumerate(outputs)}
        for at, ours in enumerate(said):
            others = [theirs for other, theirs in enumerate(said) if other != at and (teaches == "all" or other == 0)]
            if others and (teaches == "all" or at > 0):
                losses = [logits.kd(ours, theirs, attended(batch), temperature=temperature) for theirs in others]
                parts[f"kd.{at}"] = weight * torch.stack(losses).mean()
        return parts

    return objective


class SelfTaught:
    """The objective that `self_taught` makes; its heads are trained along and then thrown away."""

    def __init__(
        self, forward: Forward, loss: Loss, at: tuple[str, ...], temperature: float, weight: float, hint_weight: float
    ) -> None:
        self.at = at
        self.heads = nn.ModuleDict()
        self._forward, self._loss = forward, loss
        self._temperature, self._weight, self._hint_weight = temperature, weight, hint_weight

    def prepare(self, model: nn.Module, batch: Batch, *, seed: int = 0) -> Self:
        """Make a head for each place, from what a batch says of its shape; before the optimizer.

        Args:
            model: The model that will be trained; left as it was.
            batch: Any batch, on the model's device.
            seed: Of the heads' weights, which do not touch the global random generator.

        Raises:
            SlivoError: If a place does not exist or does not run.
            ShapeError: If a place or the model puts out no features.
        """
        with evaluating(model), torch.no_grad():
            said, seen = self._run(model, batch)
        self.heads = nn.ModuleDict()
        last = seen[self.at[-1]]
        for number, path in enumerate(self.at[:-1]):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed + number)
                head = nn.Linear(channels(seen[path]), said.shape[-1])
            mapped = adapter(seen[path], last, seed=seed + number)
            made = nn.ModuleDict({"logits": head.to(said.device, torch.promote_types(said.dtype, torch.float32))})
            if mapped is not None:
                made["features"] = mapped
            self.heads[str(number)] = made
        return self

    def parameters(self) -> list[Parameter]:
        """Return the heads' parameters, which must be trained along; they are no part of the model."""
        return list(self.heads.parameters())

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of a batch, by name; their sum is the loss."""
        if len(self.heads) != len(self.at) - 1:
            raise SlivoError("call prepare(model, batch) first, and give parameters() to the optimizer")
        with tap(model, self.at) as seen:
            output = self._forward(model, batch)
        said, last = logits_of(output), seen[self.at[-1]]
        parts = {"labels": self._loss(output, batch)}
        for number, path in enumerate(self.at[:-1]):
            head = self.heads[str(number)]
            assert isinstance(head, nn.ModuleDict)
            with exact(said):
                own = head["logits"](average(seen[path]).to(next(head["logits"].parameters()).dtype))
            parts[f"labels@{path}"] = self._loss(own, batch)
            parts[f"kd@{path}"] = self._weight * logits.kd(own, said, attended(batch), temperature=self._temperature)
            if self._hint_weight:
                mapped = dict(head.items()).get("features")
                parts[f"hint@{path}"] = self._hint_weight * features.hint(seen[path], last, mapped)
        return parts

    def _run(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with tap(model, self.at) as seen:
            said = logits_of(self._forward(model, batch))
        missing = [path for path in self.at if path not in seen]
        if missing:
            raise SlivoError(f"module {missing[0]!r} did not run; name modules that the forward calls")
        return said, seen


def self_taught(
    task_forward: Forward,
    task_loss: Loss,
    at: Sequence[str],
    *,
    temperature: float = 3.0,
    weight: float = 0.3,
    hint_weight: float = 0.03,
) -> SelfTaught:
    """Return an objective by which a model's deeper layers teach its shallower ones.

    Each place but the last gets a head (mean over places, one linear layer) that learns the labels, what the whole
    model says, and the features of the last place. The heads are thrown away; what the layers learned by them stays.

    Args:
        task_forward: ``(model, batch)`` to the model's output.
        task_loss: ``(output, batch)`` to a scalar; heads are judged by it, too.
        at: Paths of two or more modules, from the shallowest to the deepest, such as the stages.
        temperature: Of the divergence from the whole model.
        weight: Of it.
        hint_weight: Of the distance from the last place's features; 0 for none.

    Returns:
        An objective for `slivo.train.fit` or any loop, once its ``prepare(model, batch)`` was called and its
        ``parameters()`` were given to the optimizer.

    Raises:
        RecipeError: If an option makes no sense.

    Source: Zhang et al. 2019, "Be Your Own Teacher", arXiv:1905.08094, eq. 2-5 (there the sum is weighted by α and λ).

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> batch = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        >>> made = self_taught(lambda net, batch: net(batch[0]),
        ...     lambda out, batch: nn.functional.cross_entropy(out, batch[1]), ["0", "2"]).prepare(net, batch)
        >>> list(made(net, batch))
        ['labels', 'labels@0', 'kd@0', 'hint@0']
    """
    _check(temperature, weight, hint_weight)
    paths = tuple(at)
    if isinstance(at, str) or len(paths) < 2 or len(set(paths)) < len(paths):
        raise RecipeError(f"at is {at!r}; name two or more different modules, from the shallowest to the deepest")
    return SelfTaught(task_forward, task_loss, paths, temperature, weight, hint_weight)


def labelled(task_loss: Loss, labels: Callable[[Batch], Tensor]) -> Loss:
    """Return a loss that counts those samples alone that have a label, for batches in which not all have one.

    Args:
        task_loss: ``(output, batch)`` to a scalar, the mean over samples.
        labels: The labels of a batch; those below 0 are none.

    Returns:
        ``(output, batch)`` to the loss of the labelled samples; 0 if there are none. With it as the task's loss a
        teacher teaches on all samples and the labels on some.

    Example:
        >>> loss = labelled(lambda out, batch: nn.functional.cross_entropy(out, batch[1]), lambda batch: batch[1])
        >>> out, targets = torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([0, -1])
        >>> bool(loss(out, (out, targets)) == nn.functional.cross_entropy(out[:1], targets[:1]))
        True
    """

    def loss(output: Any, batch: Batch) -> Tensor:
        known = labels(batch) >= 0
        if bool(known.all()):
            return task_loss(output, batch)
        if not bool(known.any()):
            return logits_of(output).sum() * 0.0
        size = len(known)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[known] if tensor.dim() and len(tensor) == size else tensor

        part, rest = (pytree.tree_map_only(Tensor, chosen, each) for each in (output, batch))
        return task_loss(part, rest)

    return loss


def _check(temperature: float, *weights: float) -> None:
    positive("temperature", temperature)
    for each in weights:
        check_weight("weight", each)
