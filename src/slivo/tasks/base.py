"""What a task is, how its batches are made, and whether a model fits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

from slivo.errors import ShapeError
from slivo.graph.capture import evaluating

if TYPE_CHECKING:  # it takes seconds to import, and imports other libraries where it finds them
    from torchmetrics import MetricCollection

Batch = Any
"""Whatever a task's loader yields; for classification ``(inputs, labels)``."""

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Task:
    """A job for a model: data, loss, metrics, and how a batch becomes the model's arguments.

    Attributes:
        kind: Kind of task, such as ``"image-classification"``.
        name: Name of the data.
        train: Data to learn from.
        val: Data to decide by (when to stop, what to prune).
        test: Data to report on; nothing is decided by it.
        inputs: Positional arguments of the model from a batch.
        loss: ``(output of the model, batch)`` to a scalar, the mean over samples.
        metrics: Makes a fresh collection of metrics.
        update: Feeds ``(collection, output, batch)``.
        primary: Name of the metric that targets speak of; higher is better.
        classes: Names of the classes.
        example_inputs: The model's positional arguments for a batch of two.
        collate: Makes a batch of a list of samples; PyTorch's own if None.
    """

    kind: str
    name: str
    train: Dataset[Any]
    val: Dataset[Any]
    test: Dataset[Any]
    inputs: Callable[[Batch], tuple[Any, ...]]
    loss: Callable[[Any, Batch], Tensor]
    metrics: Callable[[], MetricCollection]
    update: Callable[[MetricCollection, Any, Batch], None]
    primary: str
    classes: tuple[str, ...]
    example_inputs: tuple[Any, ...]
    collate: Callable[[list[Any]], Batch] | None = None


@runtime_checkable
class BatchSource(Protocol):
    """A data set that makes a whole batch at once, which for small samples is many times faster than one by one."""

    def take(self, indices: Sequence[int], key: tuple[int, int] | None) -> Batch:
        """Return the batch of some samples.

        Args:
            indices: Which samples.
            key: ``(seed, epoch)`` for training, which anything random must be a function of; None where samples
                are wanted as they are.

        Returns:
            The batch.
        """


class Shuffle(Sampler[int]):
    """A new order every epoch, a function of (seed, epoch) alone.

    Each pass is the next epoch; `set_epoch` says which one comes next, as a training that resumes must.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.next_epoch = 0
        self.key = (seed, 0)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass the one of an epoch."""
        self.next_epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.key = (self.seed, self.next_epoch)
        self.next_epoch += 1
        yield from torch.randperm(self.size, generator=generator(*self.key)).tolist()


class _Whole(Dataset[Any]):
    """Hands the loader whole batches; `DataLoader` asks for them through ``__getitems__``."""

    def __init__(self, data: BatchSource | TensorDataset, size: int, shuffle: Shuffle | None) -> None:
        self.data = data
        self.size = size
        self.shuffle = shuffle

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.data[index]  # type: ignore[index]

    def __getitems__(self, indices: list[int]) -> Batch:
        if isinstance(self.data, BatchSource):
            return self.data.take(indices, self.shuffle.key if self.shuffle else None)
        rows = torch.tensor(indices)
        return tuple(tensor[rows] for tensor in self.data.tensors)


def generator(seed: int, epoch: int) -> torch.Generator:
    """Return a random generator that is a function of (seed, epoch); neighbors are unrelated."""
    # An odd multiplier modulo 2^63 maps different pairs to different states for all seeds and epochs below 2^31.
    return torch.Generator().manual_seed((seed * 0x1_0000_0001 + epoch * 0x9E37_79B9) % 2**63)


def loader(task: Task, split: Split, *, batch_size: int, seed: int | None = None) -> DataLoader[Any]:
    """Return the batches of a split.

    Tensor data sets, and others with a ``take`` (`BatchSource`), are indexed a batch at a time.

    Args:
        task: The task.
        split: ``"train"``, ``"val"`` or ``"test"``.
        batch_size: Samples in a batch; the last may be smaller.
        seed: If given, shuffled: the order (and anything random in the data) is a function of (seed, epoch) only.
            Each pass is the next epoch; ``loader.sampler.set_epoch(epoch)`` sets it, which `slivo.train.fit` does.

    Returns:
        A loader without worker processes.

    Example:
        >>> from slivo.tasks import classification
        >>> data = TensorDataset(torch.eye(3), torch.arange(3))
        >>> task = classification("eye", data, data, data, classes="abc", example_inputs=(torch.eye(3)[:2],))
        >>> [labels.tolist() for _, labels in loader(task, "val", batch_size=2)]
        [[0, 1], [2]]
    """
    data = {"train": task.train, "val": task.val, "test": task.test}[split]
    size = len(data)  # type: ignore[arg-type]
    shuffle = None if seed is None else Shuffle(size, seed)
    # A task's own collate must see the samples, so that it is not passed by.
    if isinstance(data, BatchSource) or (type(data) is TensorDataset and task.collate is None):
        whole = _Whole(data, size, shuffle)
        return DataLoader(whole, batch_size, sampler=shuffle, collate_fn=_as_is)
    return DataLoader(data, batch_size, sampler=shuffle, collate_fn=task.collate)


def forward(task: Task, model: nn.Module, batch: Batch) -> Any:
    """Return a model's output for a batch of a task.

    Args:
        task: The task; says what of the batch the model gets.
        model: The model, in whatever mode it is.
        batch: A batch of the task's loader.

    Returns:
        What the model returns.
    """
    return model(*task.inputs(batch))


def check(task: Task, model: nn.Module) -> None:
    """Run one batch of two samples, and say clearly what is wrong if the model does not fit the task.

    Args:
        task: The task.
        model: The model; left as it was.

    Raises:
        ShapeError: If the model cannot take the batch, or its output does not suit the task's classes or loss;
            names the module, the shape it got, and what it expects.

    Example:
        >>> from slivo.tasks import classification
        >>> data = TensorDataset(torch.eye(3), torch.arange(3))
        >>> task = classification("eye", data, data, data, classes="abc", example_inputs=(torch.eye(3)[:2],))
        >>> check(task, nn.Linear(3, 3))
        >>> check(task, nn.Linear(4, 3))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        slivo.errors.ShapeError: the model (Linear) got an input of shape (2, 3) from task 'eye', but expects 4 ...
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batch = next(iter(loader(task, "val", batch_size=2)))
    batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    trail: list[tuple[str, nn.Module, tuple[Any, ...]]] = []
    handles = [module.register_forward_pre_hook(_follow(name, trail)) for name, module in model.named_modules()]
    handles += [module.register_forward_hook(lambda *_: _leave(trail)) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            output = forward(task, model, batch)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ShapeError(_misfit(task, trail, error)) from error
    finally:
        for handle in handles:
            handle.remove()
    _check_output(task, output, batch)


def _follow(name: str, trail: list[tuple[str, nn.Module, tuple[Any, ...]]]) -> Callable[..., None]:
    return lambda module, args: trail.append((name, module, args))


def _leave(trail: list[tuple[str, nn.Module, tuple[Any, ...]]]) -> None:
    trail.pop()


def _misfit(task: Task, trail: list[tuple[str, nn.Module, tuple[Any, ...]]], error: Exception) -> str:
    """Describe why a model could not take a batch; the trail ends at the module that failed."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not trail:
        return f"the inputs of task {task.name!r} cannot be taken out of its batch: {reason}"
    name, module, args = trail[-1]
    place = f"module {name!r} ({type(module).__name__})" if name else f"the model ({type(module).__name__})"
    shapes = [tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]
    got = f"{place} got an input of shape {', '.join(map(str, shapes)) or '(no tensor)'} from task {task.name!r}"
    wants = _wants(module, shapes[0]) if shapes else None
    return f"{got}, but expects {wants}; change the model or the data" if wants else f"{got} and failed: {reason}"


def _wants(module: nn.Module, shape: tuple[int, ...]) -> str | None:
    """Say what a layer expects instead of a shape; None if the shape suits it or the layer is not known."""
    if isinstance(module, nn.Linear) and shape[-1:] != (module.in_features,):
        return f"{module.in_features} features"
    if isinstance(module, nn.modules.conv._ConvNd):
        dims = len(module.kernel_size) + 2
        if len(shape) != dims or shape[1] != module.in_channels:
            return f"{dims} dimensions with {module.in_channels} channels"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and shape[1:2] != (module.num_features,):
        return f"{module.num_features} channels"
    return None


def _check_output(task: Task, output: Any, batch: Batch) -> None:
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if task.kind.endswith("classification") and isinstance(output, Tensor) and shape[1:] != (len(task.classes),):
        raise ShapeError(
            f"the model's output for task {task.name!r} has shape {shape}, expected (batch, {len(task.classes)}): "
            "one score for each class; change the model's last layer"
        )
    try:
        task.loss(output, batch)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ShapeError(
            f"the model's output ({shape}) does not suit the loss of task {task.name!r}: {reason}"
        ) from error


def _as_is(batch: Batch) -> Batch:
    return batch
