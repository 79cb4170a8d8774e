"""Capture: a model and example inputs become an ATen graph whose tensors are named as in the model."""

from __future__ import annotations

import copy
import logging
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._functorch import config as _functorch_config
from torch._subclasses import meta_utils
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from slivo.errors import CaptureError
from slivo.graph.checks import check_model
from slivo.graph.copies import computed, keep_persistence_
from slivo.graph.inputs import Call, ExampleInputs, as_args, batch_size, describe, fresh
from slivo.graph.sizes import check_sizes_, listening, symbolic_shapes
from slivo.graph.sparing import sparing

_log = logging.getLogger("slivo")


@dataclass(frozen=True)
class Capture:
    """An ATen graph of a model.

    Args:
        graph: The graph module. It shares the model's tensors under their names, is called as the model is, and
            gives out what the model gives out.
        tensors: For each node that fetches a parameter or buffer, the model's name of it. A tensor that has several
            names (tied weights) has one here, the first that the model lists.
        by_values: Whether the code asks for values of tensors, so that the graph is only the way that the example took.
    """

    graph: fx.GraphModule
    tensors: dict[str, str]
    by_values: bool = False


def capture(
    model: nn.Module, example_inputs: ExampleInputs, *, training: bool = False, dynamic: bool = False
) -> Capture:
    """Capture the model with `torch.export` (not strict: Python runs as it is).

    Args:
        model: Any module; its mode, parameters and buffers are as before afterwards.
        example_inputs: As in `slivo.graph.inputs.as_args`.
        training: Whether it is captured in training mode, in evaluation mode otherwise.
        dynamic: Whether the graph is to run on inputs of other sizes, too: on all for which the code takes the way that
            it takes with the example; it refuses others (`slivo.graph.sizes`). Where PyTorch cannot follow the sizes
            of all dimensions, it runs on other sizes of the first of each input, or on none.

    Raises:
        CaptureError: If the model does not accept the inputs, or PyTorch cannot capture it.
    """
    check_model(model)
    args, kwargs = as_args(example_inputs)
    real, refused = not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]), False
    with evaluating(model, training=training), torch.no_grad(), quiet(), sparing():
        given, args, kwargs = (model, args, kwargs) if real else _imagined(model, args, kwargs)
        # Tensors that the code makes are on the CPU too then, whatever the default device is.
        with nullcontext() if real else torch.device("cpu"):
            try:
                module = _export(given, args, kwargs, dynamic=dynamic)
            except Exception as error:
                module, refused = _with_values(given, args, kwargs, error, dynamic=dynamic), True
    if refused and not training:
        _log.warning(
            "the code of %s asks for values of tensors: its graph is the way that the example inputs take through it",
            type(model).__name__,
        )
    if not real:
        put_tensors_(module, model)
    _name_constants_(module)
    _forget_caches_(module)
    for block in module.modules():
        if isinstance(block, fx.GraphModule) and block is not module:
            block.recompile()
    # Made anew, because an exported module refuses to be put into training or evaluation mode.
    graph = fx.GraphModule(module, module.graph, type(model).__name__)
    keep_persistence_(graph, model)
    first = canonical_names(model)
    fetched = {node.name: str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    return Capture(graph, {node: first[name] for node, name in fetched.items() if name in first}, refused)


def _export(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], *, dynamic: bool) -> fx.GraphModule:
    """Export a model, with sizes symbolic as far as PyTorch can follow if it is to be dynamic; others are checked."""
    for dims in (None, 1) if dynamic else ():
        try:
            with listening() as answers:
                shapes: Any = symbolic_shapes((args, kwargs), dims)
                program = torch.export.export(model, args, kwargs, strict=False, dynamic_shapes=shapes)
            module = program.module(check_guards=False)
            check_sizes_(module, answers)
            return module
        except Exception as error:  # whatever PyTorch and the model's code raise on symbols
            _log.debug("%s cannot be captured with symbolic sizes: %s", type(model).__name__, error)
    module = torch.export.export(model, args, kwargs, strict=False).module(check_guards=False)
    if dynamic:
        check_sizes_(module)
    return module


def _name_constants_(module: fx.GraphModule) -> None:
    """Fetch by name what the code reached past the modules, as in Keras, so that export took it for constants."""
    named = {_storage(tensor): name for name, tensor in module.named_parameters()}
    for node in module.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith("lifted_tensor"):
            constant = getattr(module, str(node.target))
            if constant.numel() and not constant.is_meta:
                node.target = named.get(_storage(constant), node.target)


def _forget_caches_(module: fx.GraphModule) -> None:
    """Take out what puts a tensor of another shape into a buffer: a cache that the code makes anew at its first call.

    The graph makes it anew at each call.
    """
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "get_attr" and not node.users:
            kept, new = (each.meta["val"].shape for each in node.args[:2])
            if list(kept) != list(new):
                module.graph.erase_node(node)


def _storage(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def output_names(captured: Capture) -> list[str]:
    """Return the names of a graph's outputs: ``output``, ``output.1`` of a tuple, ``output.logits`` of a mapping."""
    spec = captured.graph.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    numbered = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)

    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

    return [".".join(["output", *map(name, path)]) for path, _ in pytree.tree_flatten_with_path(numbered)[0]]


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Return for every name of every parameter and buffer the first name that the same tensor has."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


@contextmanager
def evaluating(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Put every module into evaluation (or training) mode, and back into the mode that each had.

    Models of transformers give out no cache of keys and values meanwhile (``config.use_cache``): it is there to
    generate with, and no output whose sizes anyone relies on.
    """
    modes = [(module, module.training) for module in model.modules()]
    configs: dict[int, Any] = {id(each): each for each in (getattr(m, "config", None) for m in model.modules())}
    caching = [each for each in configs.values() if getattr(each, "use_cache", None) is True]
    model.train(training)
    for config in caching:
        config.use_cache = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for config in caching:
            config.use_cache = True


@contextmanager
def trying(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Have a model evaluate (or train) without gradients, and its buffers be as before afterwards, whatever it does."""
    kept = [
        (module._buffers, name, buffer, None if buffer.is_meta else buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    with evaluating(model, training=training), torch.no_grad():
        try:
            yield
        finally:
            for held, name, buffer, value in kept:
                held[name] = buffer
                if value is not None and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's warnings, and the tracebacks that it logs of what it then raises, from the user."""

    def silent(_: logging.LogRecord) -> bool:
        return False

    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    for handler in handlers:
        handler.addFilter(silent)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(silent)


def _imagined(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[nn.Module, tuple[object, ...], dict[str, object]]:
    """Return a model on the meta device, and its inputs, as if they were on the CPU, without their data.

    Its code may make tensors on a device of its own choice, which do not mix with those of the meta device; and the
    graph is to make them where the model will be.
    """
    tensors = [*model.parameters(), *model.buffers()]
    with FakeTensorMode():
        empty = {id(each): torch.empty(each.shape, dtype=each.dtype, device="cpu") for each in tensors}
        for each in tensors:
            if isinstance(each, nn.Parameter):
                empty[id(each)] = nn.Parameter(empty[id(each)], requires_grad=each.requires_grad)
        copied = copy.deepcopy(model, computed(model) | empty)
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda each: torch.empty(each.shape, dtype=each.dtype, device="cpu"), (args, kwargs)
        )
    return copied, args, kwargs


def put_tensors_(graph: nn.Module, model: nn.Module) -> None:
    """Give a captured graph the tensors of a model in place of those of the same names."""
    owners = dict(model.named_modules(remove_duplicate=False))
    for path, module in graph.named_modules(remove_duplicate=False):
        for kind in ("_parameters", "_buffers"):
            held = getattr(owners[path], kind) if path in owners else {}
            getattr(module, kind).update({name: held[name] for name in getattr(module, kind) if name in held})


def _with_values(
    model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], refused: Exception, *, dynamic: bool
) -> fx.GraphModule:
    """Capture again with the example's values at hand: code that asks for a value takes the way that the example takes.

    Raises:
        CaptureError: If that fails too; says why the first attempt did.
    """
    values = _functorch_config.patch(
        fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True
    )
    try:
        with values, _values_of_parameters():
            return _export(model, args, kwargs, dynamic=dynamic)
    except Exception:
        raise _explain(model, args, kwargs, refused) from refused


@contextmanager
def _values_of_parameters() -> Iterator[None]:
    """Have PyTorch take over the values of parameters, too: it copies those of plain tensors alone (2.6 to 2.13).

    Without their values, code that asks for any that depends on them would take a way by chance.
    """
    plain = meta_utils._safe_copy

    def copied(target: Tensor, source: Tensor | None) -> None:
        plain(target, source.data if type(source) is nn.Parameter else source)

    with patch.object(meta_utils, "_safe_copy", copied):
        yield


def _explain(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], error: Exception) -> CaptureError:
    """Tell a call that the model itself rejects from one that only the capture rejects."""
    refused = _refusal(model, args, kwargs)
    return refused or CaptureError(
        f"{type(model).__name__} cannot be captured as a graph with inputs ({describe(args, kwargs)}): {_reason(error)}"
    )


def check_call(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Look whether something is a model, and whether example inputs are any.

    Raises:
        CaptureError: If it is no model, or there is no sample in the batch.
    """
    check_model(model)
    batch_size(example_inputs)


def check_runs(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model once on inputs: a capture knows shapes alone, and passes ids beyond a table and some wrong dtypes.

    Raises:
        CaptureError: If it fails on them.
    """
    check_model(model)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        return
    refused = _refusal(model, *as_args(example_inputs))
    if refused is not None:
        raise refused


def check_repeats(model: nn.Module, example_inputs: ExampleInputs) -> None:
    """Run a model twice, as it is when a cut is tried.

    Raises:
        CaptureError: If it fails, or gives out something else at the second call.
    """
    check_runs(model, example_inputs)
    args, kwargs = fresh(example_inputs)
    with trying(model):
        # What is given out may be what was given in, or be changed by the next call.
        first, last = (pytree.tree_map_only(Tensor, Tensor.clone, model(*args, **kwargs)) for _ in range(2))
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(last), strict=False)
    if any(isinstance(one, Tensor) and not torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs):
        raise CaptureError(
            f"{type(model).__name__} gives out something else at each call, in evaluation mode too, so that no cut of "
            "it can be checked; let it draw no random numbers, and change neither its inputs nor its buffers in place"
        )


def _refusal(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> CaptureError | None:
    """Run a model; return what is to be said if it fails."""
    copied, named = fresh(Call(args, kwargs))
    try:
        with trying(model):
            model(*copied, **named)
    except Exception as failure:
        return CaptureError(
            f"{type(model).__name__} fails on the example inputs ({describe(args, kwargs)}): {_reason(failure)}. "
            "Give inputs of the shapes, dtypes and devices that the model is used with"
        )
    return None


def _reason(error: Exception) -> str:
    """Return the first line of what an exception says, or its name if it says nothing."""
    said = str(error).strip().partition("\n")[0]
    if not said or isinstance(error, KeyError):  # whose words are the key alone
        said = f"{type(error).__name__} {said}".strip()
    return textwrap.shorten(said, 240, placeholder=" …")
