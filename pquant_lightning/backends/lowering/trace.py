"""From a model to a graph of aten operations that other frameworks can compute, by `torch.export`."""

import inspect
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.dynamic_shapes import refine_dynamic_shapes_from_suggested_fixes
from torch.export.graph_signature import OutputKind

from pquant_lightning.core._private import pytree
from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import deploy, iter_deployed
from pquant_lightning.core.errors import ModelError, known
from pquant_lightning.core.report import as_call

Axes = Mapping[str, Mapping[int, str]]
_NO_LIMIT = 2**31
_ROUNDS = 3  # of asking torch for the range of the open sizes
_LEAST_SIZES = (1, 3, 9, 33)  # of images and sequences, in turn, and the example's: strides leave one of smaller ones


@dataclass(frozen=True)
class Traced:
    """A finalized model with what goes in and comes out; its graph is made when it is first asked for.

    Attributes:
        model: the finalized copy, in eval mode, on the CPU.
        traced: what is traced in its place: itself, or its twin for one format.
        args: positional example inputs, with two or more along open sizes.
        kwargs: keyword example inputs.
        inputs: names of the tensors that go in, in the graph's order.
        outputs: names of the tensors that come out, in the graph's order.
        axes: for each input the names of its open sizes, by dimension.
    """

    model: nn.Module
    traced: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the example inputs, in the graph's order."""
        return tensors_in((self.args, self.kwargs))

    def ordered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Other arguments of forward, in the order in which the example has its own, however they are given."""
        signature = inspect.signature(self.model.forward)
        given = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        return [given.get(name) for name in (*signature.bind_partial(*self.args).arguments, *self.kwargs)]

    @cached_property
    def _exported(self) -> tuple[ExportedProgram, dict[str, int]]:
        found = _export(self.traced, self.args, self.kwargs, self.axes, list(self.inputs))
        outputs = found[0].graph_signature.output_specs
        written = [spec.target for spec in outputs if spec.kind == OutputKind.BUFFER_MUTATION]
        if written:
            raise ModelError(
                f"The forward of {type(self.model).__name__} writes into {', '.join(map(repr, written))}, and an "
                "exported file has no state. Take what it keeps out of forward."
            )
        return found

    @property
    def program(self) -> ExportedProgram:
        """The graph of aten operations, without mutation and not decomposed further.

        Raises:
            ModelError: the forward decides by values of tensors, fixes a size that is to be open, or writes into the
                model.
        """
        return self._exported[0]

    @property
    def largest(self) -> dict[str, int]:
        """The most that an open size may be, by its name, where the model has a limit (a table of places, say)."""
        return self._exported[1]

    @property
    def used(self) -> set[str]:
        """Names of the parameters, buffers and constants that the graph reads."""
        specs = {spec.arg.name: spec.target for spec in self.program.graph_signature.input_specs}
        placeholders = [node for node in self.program.graph.nodes if node.op == "placeholder" and node.users]
        return {target for node in placeholders if (target := specs[node.name]) is not None}

    def run(self, inputs: Sequence[Tensor], model: nn.Module | None = None) -> list[Tensor]:
        """What the model, or another in its place, gives for other tensors in the places of the example's."""
        args, kwargs = with_tensors((self.args, self.kwargs), inputs)
        with torch.no_grad():
            return tensors_in((model or self.model)(*args, **kwargs))


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors inside of containers, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def with_tensors(value: Any, tensors: Sequence[Any]) -> Any:
    """The same containers with other tensors."""
    leaves, structure = pytree.tree_flatten(value)
    left = iter(tensors)
    return pytree.tree_unflatten([next(left) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)


def trace(
    model: nn.Module,
    example_inputs: Any,
    dynamic_axes: Axes | None = None,
    twin: Callable[[nn.Module], nn.Module] | None = None,
    finalizes: bool = True,
) -> Traced:
    """Finalizes a copy of a model and finds the names of its inputs and outputs.

    Args:
        model: training form or deployed form; not touched.
        example_inputs: what `forward` takes: a tensor, a tuple of positional or a dict of keyword arguments.
        dynamic_axes: by the name of an input, the names of its open sizes by dimension, e.g.
            `{"input_ids": {0: "batch", 1: "tokens"}}`. None leaves the first dimension of all inputs open that have
            the batch size there.
        twin: makes what is traced in the place of the finalized model.
        finalizes: False copies the model as it is.

    Raises:
        ModelError: the forward does not run on the inputs; unknown names in `dynamic_axes`.

    >>> traced = trace(nn.Linear(4, 2), torch.zeros(1, 4))
    >>> traced.inputs, traced.outputs, traced.axes, traced.tensors[0].shape
    (('input',), ('output',), {'input': {0: 'batch'}}, torch.Size([2, 4]))
    """
    if meta := [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]:
        raise ModelError(f"{meta[0]!r} has no values (it is on the meta device); load the model's weights first.")
    model = finalized_copy(model) if finalizes else deep_copy(model).eval().cpu()
    args, kwargs = as_call(example_inputs)
    args, kwargs = pytree.tree_map_only(Tensor, _alone, (args, kwargs))
    names = _names(model, args, kwargs)
    args, kwargs, axes = _open_sizes(args, kwargs, names, dynamic_axes)
    outputs = _output_names(_try(model, args, kwargs))
    traced = model if twin is None else twin(model)
    return Traced(model, traced, args, kwargs, tuple(names), tuple(outputs), axes)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor without the larger one that it may be a part of, which a file would hold."""
    return tensor.detach().cpu().clone()


def finalized_copy(model: nn.Module) -> nn.Module:
    """The deployed form of a copy, in eval mode, on the CPU; a single layer may be a compressed one itself."""
    model = deep_copy(model)
    if isinstance(model, CompressedLayer):
        model = dict(iter_deployed(model))[""]
    else:
        deploy(model)
    return model.eval().cpu().requires_grad_(False)  # attention takes another way where a mask has a gradient


def _names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """A name for each tensor: that of forward's parameter, with its path inside where it is nested."""
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ModelError(
            f"The example inputs do not fit {type(model).__name__}.forward: {error}. Give a tensor, a tuple of "
            "positional or a dict of keyword arguments."
        ) from error
    positional, parameters = list(bound.arguments), inspect.signature(model.forward).parameters
    found = []
    for path, leaf in pytree.tree_leaves_with_path((args, kwargs)):
        if isinstance(leaf, Tensor):
            (_, first), (_, second), *rest = [(key, _key(key)) for key in path]
            head = positional[min(second, len(positional) - 1)] if first == 0 else second
            if first == 0 and parameters[head].kind is inspect.Parameter.VAR_POSITIONAL:
                head = f"{head}_{second - len(positional) + 1}"
            found.append("_".join(str(part) for part in (head, *(name for _, name in rest))))
    if not found:
        raise ModelError("The example inputs hold no tensor.")
    return found


def _key(key: Any) -> Any:
    return next(getattr(key, name) for name in ("key", "idx", "name") if hasattr(key, name))


def _output_names(outputs: Any) -> list[str]:
    found = []
    for path, leaf in pytree.tree_leaves_with_path(outputs):
        if isinstance(leaf, Tensor):
            parts = [str(_key(key)) for key in path]
            named = not parts or not parts[0].isdigit()
            found.append("_".join(parts if named and parts else ["output", *parts]))
    if not found:
        raise ModelError(
            f"The model gives a {type(outputs).__name__}, in which there are no tensors that torch knows of: return "
            "tensors, tuples or dicts, or register the class by torch.utils._pytree.register_dataclass."
        )
    return found


def _open_sizes(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str], given: Axes | None
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, dict[int, str]]]:
    """The open sizes of each input; inputs whose batch is one are repeated, since a size of one cannot be left open."""
    tensors = tensors_in((args, kwargs))
    if given is None:
        batch = next((t.shape[0] for t in tensors if t.dim()), None)
        axes = {n: {0: "batch"} if t.dim() and t.shape[0] == batch else {} for n, t in zip(names, tensors, strict=True)}
    else:
        for name in given:
            if name not in names:
                raise ModelError(f"dynamic_axes names {name!r}, and the model has no such input. {known(name, names)}")
        if wrong := [name for name, sizes in given.items() if not isinstance(sizes, Mapping)]:
            raise ModelError(
                f"dynamic_axes gives names of sizes by dimension, as in {{{wrong[0]!r}: {{0: 'batch'}}}}, got "
                f"{given[wrong[0]]!r}."
            )
        axes = {name: dict(given.get(name, {})) for name in names}
    repeated: list[Tensor] = []
    for name, tensor in zip(names, tensors, strict=True):
        for axis in axes[name]:
            if not -tensor.dim() <= axis < tensor.dim():
                raise ModelError(f"dynamic_axes opens dimension {axis} of {name!r}, which has {tensor.dim()}.")
            if tensor.shape[axis] == 1:
                tensor = torch.cat([tensor, tensor], axis)
        repeated.append(tensor)
    args, kwargs = with_tensors((args, kwargs), repeated)
    return args, kwargs, axes


def _dynamic_shapes(
    args: tuple[Any, ...], kwargs: dict[str, Any], axes: dict[str, dict[int, str]], names: list[str], least: int
) -> Any:
    opened = {name: axis for sizes in axes.values() for axis, name in sizes.items()}
    dims = {name: Dim(name, min=least if axis else 1) for name, axis in opened.items()}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    order = iter(names)

    def sizes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        return {axis % leaf.dim(): dims[name] for axis, name in axes[next(order)].items()}

    args, kwargs = pytree.tree_unflatten([sizes(leaf) for leaf in leaves], structure)
    return args, kwargs


def _try(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors_in((args, kwargs)))
        raise ModelError(
            f"{type(model).__name__} does not run on the example inputs ({shapes}): {str(error).splitlines()[0]}"
        ) from error


def _export(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], axes: dict[str, dict[int, str]], names: list[str]
) -> tuple[ExportedProgram, dict[str, int]]:
    """The graph, and the most that open sizes may be."""
    given = dict(zip(names, tensors_in((args, kwargs)), strict=True))
    smallest = min((given[n].shape[axis] for n, sizes in axes.items() for axis in sizes if axis), default=1)
    first: ModelError | None = None
    for least in (*(least for least in _LEAST_SIZES if least < smallest), smallest):
        try:
            return _export_from(least, model, args, kwargs, axes, names)
        except ModelError as error:
            first = first or error
            if "Constraints violated" not in str(error.__cause__):
                break
    assert first is not None
    raise first


def _export_from(
    least: int,
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    axes: dict[str, dict[int, str]],
    names: list[str],
) -> tuple[ExportedProgram, dict[str, int]]:
    """The same, of sizes from `least` on; batches may be of one."""
    positional, named = _dynamic_shapes(args, kwargs, axes, names, least)
    shapes: Any = _by_parameter(list(inspect.signature(model.forward).parameters.values()), positional, named)
    for _ in range(_ROUNDS):
        try:
            with quietly(), torch.no_grad():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
                return program.run_decompositions({}), _limits(shapes)
        except Exception as error:  # torch raises many types, some of them private
            narrower = _narrowed(shapes, error)
            if narrower is None:
                raise ModelError(_why(model, error, axes)) from error
            shapes, last = narrower, error
    raise ModelError(_why(model, last, axes)) from last


def _narrowed(shapes: Any, error: Exception) -> Any:
    """Open sizes within the range that torch asks for (a table of 512 places, say); None where it asks for one size."""
    if "Suggested fixes" not in str(error):
        return None
    fixes = str(error)[str(error).index("Suggested fixes") :].split("\n\n")[0]
    narrower = refine_dynamic_shapes_from_suggested_fixes(fixes, shapes)
    sizes = pytree.tree_leaves(narrower)
    return None if any(isinstance(size, int) for size in sizes) else narrower


def _limits(shapes: Any) -> dict[str, int]:
    dims = [dim for dim in pytree.tree_leaves(shapes) if hasattr(dim, "max")]
    return {dim.__name__: dim.max for dim in dims if isinstance(dim.max, int) and dim.max < _NO_LIMIT}


def _by_parameter(
    parameters: list[inspect.Parameter], positional: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    left = list(positional)
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and left:
            found[parameter.name], left = tuple(left), []
        elif left and parameter.kind is not inspect.Parameter.VAR_KEYWORD:
            found[parameter.name] = left.pop(0)
    var = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    direct = {p.name for p in parameters}
    for name, value in named.items():
        if name in direct or var is None:
            found[name] = value
        else:
            found.setdefault(var, {})[name] = value
    return found


def _why(model: nn.Module, error: Exception, axes: dict[str, dict[int, str]]) -> str:
    name, text = type(model).__name__, str(error)
    if "DataDependent" in type(error).__name__ or "data-dependent" in text:
        where = next((line.strip() for line in text.splitlines() if line.strip().startswith("File ")), "")
        return (
            f"{name} cannot be exported: its forward decides by the values of tensors (a Python `if`, .item() or a "
            f"loop over them). Use torch.where or torch.cond instead. {where}\n{text.splitlines()[0]}"
        )
    if found := re.search(r"marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return (
            f"The forward of {name} fixes the size {found[1]!r} to {found[2]}, and it is to be open. Use x.shape there "
            "instead of a number, or say which sizes are open: dynamic_axes={'input': {0: 'batch'}} ({} for none)."
        )
    return f"torch.export cannot trace {name}: {type(error).__name__}: {text[:600]}"


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings and prints of torch's exporters, which speak of torch's inside."""
    loggers = [
        logging.getLogger(name) for name in ("torch.export", "torch.onnx", "torch._export", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
