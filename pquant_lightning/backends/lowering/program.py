"""Runs the graph of a traced model in another framework: every node by its entry in the table."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from pquant_lightning.backends.lowering import elementwise, layers, shaping  # noqa: F401 (they fill the table)
from pquant_lightning.backends.lowering.namespace import Namespace
from pquant_lightning.backends.lowering.table import LOWERINGS, check_supported, missing_operations, operation_of

Params = dict[str, Any]
Function = Callable[[Params, Sequence[Any]], list[Any]]

_ROUNDS = 3  # what a decomposition gives may itself have to be decomposed


def supported(program: ExportedProgram) -> ExportedProgram:
    """The program with the operations that the table lacks decomposed, where torch knows how.

    Raises:
        UnsupportedOperationError: some remain.
    """
    for _ in range(_ROUNDS):
        missing = missing_operations(program.graph)
        known = torch.export.default_decompositions()
        wanted = {node.target for node in missing.values()} & set(known.keys())
        if not wanted:
            break
        program = program.run_decompositions({target: known[target] for target in wanted})
    check_supported(program.graph)
    return program


def to_function(program: ExportedProgram, ns: Namespace) -> tuple[Function, dict[str, Tensor]]:
    """The program as a pure function over a framework's arrays, and its weights.

    Returns:
        `function(params, inputs)`, the tensors that come out, with `params` by name and `inputs` in the graph's order;
        and the parameters, buffers and constants by name; one that has several names has the first.

    Raises:
        UnsupportedOperationError: operations that the table lacks.
    """
    program = supported(program)
    signature = program.graph_signature
    weights: dict[str, Tensor] = {}
    first: dict[Any, str] = {}  # of tensors that have several names
    places: dict[str, str] = {}  # placeholder -> name of its weight
    inputs: list[str] = []
    for spec in signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            assert spec.target is not None
            held = program.state_dict if spec.target in program.state_dict else program.constants
            tensor = held[spec.target].detach()
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            places[spec.arg.name] = first.setdefault(key, spec.target) if tensor.numel() else spec.target
            weights[places[spec.arg.name]] = tensor
        elif spec.kind is InputKind.USER_INPUT and hasattr(spec.arg, "name") and not hasattr(spec.arg, "value"):
            inputs.append(spec.arg.name)
    results = [
        spec.arg.name
        for spec in signature.output_specs
        if spec.kind is OutputKind.USER_OUTPUT and not hasattr(spec.arg, "value")
    ]
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    last_use = _last_uses(nodes, results)

    def run(params: Params, given: Sequence[Any]) -> list[Any]:
        values = {name: params.get(target) for name, target in places.items()} | dict(zip(inputs, given, strict=True))
        for node in nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n.name])
            values[node.name] = _call(ns, node, args, kwargs)
            for done in last_use.get(node.name, ()):
                values.pop(done, None)
        return [values[name] for name in results]

    return run, weights


def _last_uses(nodes: list[fx.Node], results: list[str]) -> dict[str, list[str]]:
    """By node, the values that nothing after it needs."""
    last: dict[str, str] = {}
    for node in nodes:
        for needed in node.all_input_nodes:
            last[needed.name] = node.name
    found: dict[str, list[str]] = {}
    for name, node_name in last.items():
        if name not in results:
            found.setdefault(node_name, []).append(name)
    return found


def _call(ns: Namespace, node: fx.Node, args: Any, kwargs: Any) -> Any:
    operation = operation_of(node)
    if operation is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    found = node.meta.get("val")
    if operation in _FACTORIES and isinstance(found, Tensor):
        kwargs = {**kwargs, "dtype": found.dtype}
    result = LOWERINGS[operation](ns, *args, **{k: v for k, v in kwargs.items() if k not in _PLACEMENT})
    if isinstance(found, Tensor) and ns.is_array(result):
        return ns.cast(result, found.dtype)
    return result


_PLACEMENT = ("layout", "device", "pin_memory", "memory_format", "non_blocking", "generator")
_FACTORIES = {f"aten.{name}" for name in ("arange.default", "arange.start", "arange.start_step")}
