"""Rewrites an ONNX graph so that onnxruntime computes in integers from end to end, and by its faster kernels."""

from collections.abc import Iterator
from typing import Any

import numpy

from pquant_lightning.backends.base import require

_PASSED = ("Relu", "MaxPool", "Reshape", "Flatten", "Transpose")  # onnxruntime moves a rounding up through these
_INTEGERS = ("DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulNBits", "QuantizeLinear")


def arrange(graph: Any) -> None:
    """Drops needless roundings, lets residuals read what their neighbours have rounded, keeps sums from being fused."""
    _drop_clips(graph)
    _drop_early_roundings(graph)
    _share_roundings(graph)
    _round_sums(graph)
    if any(node.op_type in _INTEGERS for node in graph.node):
        _keep_sums(graph)


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


def _drop_clips(graph: Any) -> None:
    """Drops a clipping that the grid behind it does, too: ReLU6, say."""
    readers, values = _readers(graph), {tensor.name: tensor for tensor in graph.initializer}
    for node in [node for node in graph.node if node.op_type == "Clip"]:
        after = readers.get(node.output[0], [])
        ends = [_number(name, values) for name in (*node.input[1:], "", "")[:2]]
        if after and all(_is_within(_grid_of(reader, values, "QuantizeLinear"), *ends) for reader in after):
            for reader in after:
                _reconnect(reader, node.output[0], node.input[0])
            graph.node.remove(node)


def _number(name: str, values: dict[str, Any]) -> float | None:
    return float(require("onnx.numpy_helper", "onnx").to_array(values[name])) if name in values else None


def _is_within(grid: tuple[float, float] | None, low: float | None, high: float | None) -> bool:
    if grid is None or low is None or high is None:
        return False
    step = (grid[1] - grid[0]) / 255
    return grid[0] > low - step / 2 and grid[1] < high + step / 2


def _drop_early_roundings(graph: Any) -> None:
    """Of conv -> Q -> DQ -> relu -> Q keeps the last: the values below zero need no codes."""
    readers = _readers(graph)
    for quantize, dequantize in list(_pairs(graph)):
        if _is_rounded_next(dequantize.output[0], readers):
            for reader in readers[dequantize.output[0]]:
                _reconnect(reader, dequantize.output[0], quantize.input[0])
            graph.node.remove(dequantize)
            graph.node.remove(quantize)


def _is_rounded_next(name: str, readers: dict[str, list[Any]]) -> bool:
    after = readers.get(name, [])
    if not after or any(node is None for node in after):
        return False
    if all(node.op_type == "QuantizeLinear" for node in after):
        return True
    return len(after) == 1 and after[0].op_type in _PASSED and _is_rounded_next(after[0].output[0], readers)


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


def _round_sums(graph: Any) -> None:
    """Rounds what is added from two grids, on the grid that holds every sum of their values."""
    readers = _readers(graph)
    made = {node.output[0]: node for node in graph.node}
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        grids = [_grid_of(made.get(name), values, "DequantizeLinear") for name in node.input]
        if node.op_type != "Add" or None in grids:
            continue
        after = readers[node.output[0]]
        last = after[0] if len(after) == 1 and after[0] is not None and after[0].op_type == "Relu" else node
        if any(reader is None or reader.op_type == "QuantizeLinear" for reader in readers[last.output[0]]):
            continue
        low = 0.0 if last is not node else sum(grid[0] for grid in grids if grid is not None)
        high = sum(grid[1] for grid in grids if grid is not None)
        _insert_rounding(graph, last, low, high, readers[last.output[0]])


def _grid_of(node: Any, values: dict[str, Any], kind: str) -> tuple[float, float] | None:
    """The ends of the grid, of one scale, that an operation of that kind has; None where it is no such."""
    if node is None or node.op_type != kind or len(node.input) != 3:
        return None
    if not all(name in values for name in node.input[1:]):
        return None
    scale, zero = (require("onnx.numpy_helper", "onnx").to_array(values[name]) for name in node.input[1:])
    return None if scale.ndim else (-float(scale) * float(zero), float(scale) * (255.0 - float(zero)))


def _insert_rounding(graph: Any, source: Any, low: float, high: float, readers: list[Any]) -> None:
    onnx, name, step = require("onnx", "onnx"), source.output[0], (high - low) / 255
    grid = [f"{name}.grid.scale", f"{name}.grid.zero"]
    for own, value in zip(grid, (numpy.float32(step), numpy.uint8(round(-low / step))), strict=True):
        graph.initializer.append(onnx.numpy_helper.from_array(numpy.asarray(value), own))
    for reader in readers:
        _reconnect(reader, name, f"{name}.rounded")
    place = 1 + next(i for i, node in enumerate(graph.node) if node.output[0] == name)
    make = onnx.helper.make_node
    graph.node.insert(place, make("DequantizeLinear", [f"{name}.codes", *grid], [f"{name}.rounded"]))
    graph.node.insert(place, make("QuantizeLinear", [name, *grid], [f"{name}.codes"]))


def _reconnect(node: Any, old: str, new: str) -> None:
    for place, name in enumerate(node.input):
        if name == old:
            node.input[place] = new
