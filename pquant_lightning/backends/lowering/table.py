"""The table from aten operations to functions over an array namespace, and what is said about missing ones."""

import re
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import fx

from pquant_lightning.core.errors import PQuantError

Lowering = Callable[..., Any]
F = TypeVar("F", bound=Lowering)

LOWERINGS: dict[str, Lowering] = {}


class UnsupportedOperationError(PQuantError, NotImplementedError):
    """A model uses operations that cannot be expressed in another framework; the message lists all of them."""


def lowers(*operations: str) -> Callable[[F], F]:
    """Enters a function into the table, as the lowering of operations by their names, "aten.relu.default"."""

    def enter(function: F) -> F:
        for operation in operations:
            LOWERINGS[operation] = function
        return function

    return enter


def register_lowering(operation: str, function: Lowering) -> None:
    """Says how an operation is computed in JAX and TensorFlow, so that models with it can be exported there.

    Args:
        operation: its name in a graph of `torch.export`, e.g. "aten.relu.default" or "my_library.my_op.default".
        function: `function(ns, *args, **kwargs)` with the arguments of the operation; tensors are arrays of the
            framework, and `ns` is a `Namespace` of functions on them.

    >>> register_lowering("my_library.twice.default", lambda ns, x: ns.add(x, x))
    """
    LOWERINGS[operation] = function


def operation_of(node: fx.Node) -> str | None:
    """The name of the operation that a node of an exported graph calls; None for Python's own functions on sizes."""
    target = node.target
    if getattr(target, "__module__", "") in ("_operator", "operator", "math", "builtins", "torch"):
        return None
    return str(target)


def missing_operations(graph: fx.Graph) -> dict[str, fx.Node]:
    """Operations of a graph that are not in the table, each with the first node that calls it."""
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (name := operation_of(node)) is not None and name not in LOWERINGS:
            found.setdefault(name, node)
    return found


def check_supported(graph: fx.Graph) -> None:
    """Checks that every operation of a graph is in the table.

    Raises:
        UnsupportedOperationError: some are not, or a size depends on values.
    """
    for node in graph.nodes:
        if re.search(r"\bu\d+\b", str(getattr(node.meta.get("val"), "shape", node.meta.get("val")))):
            raise UnsupportedOperationError(
                f"The size of {node.name} depends on values ({_where(node)}): a mask of booleans takes values out, or "
                "nonzero() counts them. JAX and TensorFlow graphs have no counterpart for it: use torch.where, or "
                "export to 'onnx' or 'pt2'."
            )
    missing = missing_operations(graph)
    if missing:
        lines = "\n".join(f"  {name}: {_where(node)}" for name, node in missing.items())
        raise UnsupportedOperationError(
            f"JAX and TensorFlow have no counterpart here for {len(missing)} operations of the model:\n{lines}\n"
            "Say how they are computed: pquant_lightning.register_lowering(name, function); or export to 'onnx' or "
            "'pt2'."
        )


def _where(node: fx.Node) -> str:
    """The module that calls a node, and the line of source."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    module = (stack[-1][0] or "the model itself") if stack else "the model itself"
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [i for i, line in enumerate(lines) if line.startswith("File ")]
    return f"in {module}" + ("" if not files else f", {' '.join(lines[files[-1] :][:2])}")


def names(prefix: str, operations: Iterable[str]) -> list[str]:
    """`aten.x.default` for each x.

    >>> names("aten.{}.default", ["relu"])
    ['aten.relu.default']
    """
    return [prefix.format(operation) for operation in operations]
