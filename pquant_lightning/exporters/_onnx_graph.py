"""Rewrites an ONNX graph so that onnxruntime computes in integers from end to end, and by its faster kernels."""

from collections.abc import Iterator
from typing import Any

import numpy

from pquant_lightning.backends.base import require

_PASSED = ("Relu", "MaxPool", "Reshape", "Flatten", "Transpose")  # onnxruntime moves a rounding up through these
_GRID = ("code", "scale", "zero")  # what DequantizeLinear reads
_LEAST_SWISH = -0.375  # the least value of x * clip(x / 6 + 1/2, 0, 1); x * sigmoid(x) has -0.279
_INTEGERS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QuantizeLinear")


def arrange(graph: Any) -> None:
    """Drops needless roundings, lets residuals read what their neighbours have rounded, keeps sums from being fused."""
    _drop_output_roundings(graph)
    _drop_clips(graph)
    _drop_early_roundings(graph)
    _share_roundings(graph)
    _round_between(graph)
    if any(node.op_type in _INTEGERS for node in graph.node):
        _keep_sums(graph)
    read = {*_read(graph), *(output.name for output in graph.output)}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def _read(graph: Any) -> Iterator[str]:
    """Names of all tensors that nodes read, in inner graphs too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _read(attribute.g)


def _keep_sums(graph: Any) -> None:
    """Writes x + y before a layer norm as Sum(x, y): Add would be fused to SkipLayerNormalization, which on CPUs takes
    five times as long as the two."""
    made = {node.output[0]: node for node in graph.node}
    for node in graph.node:
        before = made.get(node.input[0]) if node.op_type == "LayerNormalization" else None
        if before is not None and before.op_type == "Add":
            before.op_type = "Sum"


def _readers(graph: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {output.name: [None] for output in graph.output}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _pairs(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Each QuantizeLinear with the DequantizeLinear behind it."""
    readers = _readers(graph)
    for node in graph.node:
        if node.op_type == "QuantizeLinear":
            after = readers.get(node.output[0], [])
            if len(after) == 1 and after[0] is not None and after[0].op_type == "DequantizeLinear":
                yield node, after[0]


def _drop_output_roundings(graph: Any) -> None:
    """What leaves the model is not rounded, nor cut to the range that it had in calibration."""
    outputs, readers = {output.name for output in graph.output}, _readers(graph)
    made = {node.output[0]: node for node in graph.node}
    for quantize, dequantize in list(_pairs(graph)):
        source = made.get(quantize.input[0])
        if dequantize.output[0] in outputs and source is not None and len(readers[source.output[0]]) == 1:
            source.output[0] = dequantize.output[0]
            graph.node.remove(dequantize)
            graph.node.remove(quantize)


def _drop_clips(graph: Any) -> None:
    """Drops a clipping that the grid behind it does, too: ReLU6, say."""
    readers, values = _readers(graph), {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Clip"]:
        after = readers.get(node.output[0], [])
        ends = [float(_array(values[name])) if name in values else None for name in (*node.input[1:], "", "")[:2]]
        if after and all(_is_within(_grid_of(reader, values, "QuantizeLinear"), *ends) for reader in after):
            for reader in after:
                _reconnect(reader, node.output[0], node.input[0])
            graph.node.remove(node)


def _array(tensor: Any) -> Any:
    return require("onnx.numpy_helper", "onnx").to_array(tensor)


def _is_within(grid: tuple[float, float] | None, low: float | None, high: float | None) -> bool:
    if grid is None or low is None or high is None:
        return False
    step = (grid[1] - grid[0]) / 255
    return grid[0] > low - step / 2 and grid[1] < high + step / 2


def _drop_early_roundings(graph: Any) -> None:
    """Of conv -> Q -> DQ -> relu -> Q keeps the last: the values below zero need no codes."""
    readers, values = _readers(graph), {tensor.name: tensor for tensor in graph.initializer}
    for quantize, dequantize in list(_pairs(graph)):
        if _is_rounded_next(dequantize.output[0], readers, values):
            for reader in readers[dequantize.output[0]]:
                _reconnect(reader, dequantize.output[0], quantize.input[0])
            graph.node.remove(dequantize)
            graph.node.remove(quantize)


def _is_rounded_next(name: str, readers: dict[str, list[Any]], values: dict[str, Any]) -> bool:
    """Whether all who read a tensor round it, to one grid, or let through to who does."""
    after = readers.get(name, [])
    if len(after) == 1 and after[0] is not None and after[0].op_type in _PASSED:
        return _is_rounded_next(after[0].output[0], readers, values)
    grids = {_grid_of(node, values, "QuantizeLinear") for node in after}
    return len(grids) == 1 and None not in grids


def _share_roundings(graph: Any) -> None:
    """Whoever reads a tensor beside a rounding of it reads the rounded one."""
    readers = _readers(graph)
    first: dict[str, Any] = {}
    for quantize, dequantize in list(_pairs(graph)):
        name = quantize.input[0]
        if name in first:
            continue
        first[name] = dequantize
        for reader in readers[name]:
            if reader is not None and reader.op_type == "Add":
                _reconnect(reader, name, dequantize.output[0])


def _round_between(graph: Any) -> None:
    """Rounds what is computed from values on grids and not rounded yet: sums, and gates as in x * sigmoid(x)."""
    grids = _Grids(graph)
    rules = {"Add": _round_sum, "Mul": _round_product, "Sigmoid": _round_gate, "HardSigmoid": _round_hard_gate}
    for node in list(graph.node):
        if node.op_type == "HardSwish" and grids.of(node.input[0]) is not None:
            _round_hard_gate(grids, _opened_swish(grids, node))
            _round_product(grids, node)
        elif node.op_type in rules:
            rules[node.op_type](grids, node)


class _Grids:
    """Which tensors of a graph lie on grids, as roundings are inserted."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.readers = _readers(graph)
        self.made = {node.output[0]: node for node in graph.node}
        self.values = {tensor.name: tensor for tensor in graph.initializer}
        self.gates: dict[str, str] = {}  # by a gate's name, of what

    def of(self, name: str) -> tuple[float, float] | None:
        """The ends of the grid that a tensor lies on."""
        return _grid_of(self.made.get(name), self.values, "DequantizeLinear")

    def add_value(self, name: str, value: Any) -> None:
        tensor = require("onnx.numpy_helper", "onnx").from_array(numpy.asarray(value), name)
        self.graph.initializer.append(tensor)
        self.values[name] = tensor

    def add_node(self, before: Any, kind: str, inputs: list[str], output: str, **attributes: float) -> Any:
        """A new node before another one."""
        made, place = require("onnx.helper", "onnx").make_node, list(self.graph.node).index(before)
        self.graph.node.insert(place, made(kind, inputs, [output], **attributes))
        self.made[output] = node = self.graph.node[place]  # a copy
        for name in inputs:
            self.readers.setdefault(name, []).append(node)
        return node

    def rewrite(self, node: Any, kind: str, inputs: list[str]) -> None:
        """Makes another operation, of other tensors, of a node."""
        for name in node.input:
            self.readers[name] = [reader for reader in self.readers[name] if reader != node]
        node.op_type, node.input[:] = kind, inputs
        del node.attribute[:]
        for name in inputs:
            self.readers.setdefault(name, []).append(node)

    def round(self, source: Any, low: float, high: float) -> str:
        """Rounds an output to 255 steps from `low` to `high`, for all who read it; the name of the rounded tensor."""
        name, step = source.output[0], (high - low) / 255
        codes, rounded, grid = f"{name}.codes", f"{name}.rounded", [f"{name}.grid.scale", f"{name}.grid.zero"]
        self.add_value(grid[0], numpy.float32(step))
        self.add_value(grid[1], numpy.uint8(round(-low / step)))
        readers = self.readers.pop(name)
        following = list(self.graph.node)[list(self.graph.node).index(source) + 1]
        self.add_node(following, "QuantizeLinear", [name, *grid], codes)
        self.add_node(following, "DequantizeLinear", [codes, *grid], rounded)
        for reader in readers:
            _reconnect(reader, name, rounded)
        self.readers[rounded] = readers
        return rounded


def _is_rounded(readers: list[Any]) -> bool:
    """Whether an output need not be rounded: it leaves the graph, or its reader does it."""
    return any(reader is None or reader.op_type == "QuantizeLinear" for reader in readers)


def _round_sum(grids: _Grids, node: Any) -> None:
    """A sum, on the grid that holds every sum of the values."""
    ends = [grids.of(name) for name in node.input]
    if None in ends:
        return
    after = grids.readers[node.output[0]]
    last = after[0] if len(after) == 1 and after[0] is not None and after[0].op_type == "Relu" else node
    if not _is_rounded(grids.readers[last.output[0]]):
        low = 0.0 if last is not node else sum(grid[0] for grid in ends if grid is not None)
        grids.round(last, low, sum(grid[1] for grid in ends if grid is not None))


def _round_product(grids: _Grids, node: Any) -> None:
    """A product, on the grid that holds every product of the values; with a gate of itself it is hardly negative."""
    first, second = (grids.of(name) for name in node.input)
    if first is None or second is None or _is_rounded(grids.readers[node.output[0]]):
        return
    corners = [a * b for a in first for b in second]
    gated = any(grids.gates.get(gate) == of for gate, of in (tuple(node.input), tuple(node.input)[::-1]))
    grids.round(node, max(min(corners), _LEAST_SWISH) if gated else min(corners), max(corners))


def _is_gate(grids: _Grids, node: Any) -> bool:
    """Whether a function of values on a grid only scales others."""
    readers = grids.readers[node.output[0]]
    return grids.of(node.input[0]) is not None and all(r is not None and r.op_type == "Mul" for r in readers)


def _round_gate(grids: _Grids, node: Any) -> None:
    """A sigmoid, which lies between 0 and 1."""
    if _is_gate(grids, node):
        grids.gates[grids.round(node, 0.0, 1.0)] = node.input[0]


def _round_hard_gate(grids: _Grids, node: Any) -> None:
    """clip(alpha x + beta, 0, 1), as a sum whose grid clips: alpha x has the codes of x."""
    found = {attribute.name: attribute.f for attribute in node.attribute}
    alpha, beta = found.get("alpha", 0.2), found.get("beta", 0.5)
    if alpha <= 0 or beta <= 0 or not _is_gate(grids, node):
        return
    name, output = node.input[0], node.output[0]
    codes, scale, zero = grids.made[name].input
    grids.add_value(f"{output}.slope", _array(grids.values[scale]) * numpy.float32(alpha))
    grids.add_value(f"{output}.shift.code", numpy.uint8(255))
    grids.add_value(f"{output}.shift.scale", numpy.float32(beta / 255))
    grids.add_value(f"{output}.shift.zero", numpy.uint8(0))
    grids.add_node(node, "DequantizeLinear", [codes, f"{output}.slope", zero], f"{output}.scaled")
    grids.add_node(node, "DequantizeLinear", [f"{output}.shift.{key}" for key in _GRID], f"{output}.shift")
    grids.rewrite(node, "Add", [f"{output}.scaled", f"{output}.shift"])
    grids.gates[grids.round(node, 0.0, 1.0)] = name


def _opened_swish(grids: _Grids, node: Any) -> Any:
    """Turns HardSwish into x * hard_sigmoid(x); the new gate."""
    name = node.input[0]
    gate = grids.add_node(node, "HardSigmoid", [name], f"{node.output[0]}.gate", alpha=1 / 6, beta=0.5)
    grids.rewrite(node, "Mul", [name, gate.output[0]])
    return gate


def _grid_of(node: Any, values: dict[str, Any], kind: str) -> tuple[float, float] | None:
    """The ends of the grid, of one scale, that an operation of that kind has; None where it is no such."""
    if node is None or node.op_type != kind or len(node.input) != 3:
        return None
    if not all(name in values for name in node.input[1:]):
        return None
    scale, zero = (_array(values[name]) for name in node.input[1:])
    return None if scale.ndim else (-float(scale) * float(zero), float(scale) * (255.0 - float(zero)))


def _reconnect(node: Any, old: str, new: str) -> None:
    for place, name in enumerate(node.input):
        if name == old:
            node.input[place] = new
