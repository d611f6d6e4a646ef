"""`.pt2`: a graph of `torch.export`, which runs without this package; the archival form with a program."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pquant_lightning.backends.lowering.trace import Traced, quietly
from pquant_lightning.core._private import quantized_decomposed
from pquant_lightning.exporters.base import PACKED, Exporter, Run, run_in_torch

_SOURCES = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")


class Pt2Exporter(Exporter):
    """`torch.export.save` of plain aten operations."""

    bits = PACKED

    def write(self, traced: Traced, path: Path) -> None:
        with quietly():
            program = traced.program.run_decompositions(_plain_grids())
            for node in program.graph.nodes:
                for key in _SOURCES:  # the lines of Python take more room than a small graph
                    node.meta.pop(key, None)
            with path.open("wb") as file:  # by a path, its name would be inside
                torch.export.save(program, file)

    def open(self, path: Path, traced: Traced) -> Run:
        module = torch.export.load(path).module()
        return run_in_torch(module, traced)

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        program = torch.export.load(path)
        held = {**program.state_dict, **{k: v for k, v in program.constants.items() if isinstance(v, Tensor)}}
        return {name: (str(t.dtype).removeprefix("torch."), t.numel() * t.element_size()) for name, t in held.items()}


def _plain_grids() -> dict[Any, Any]:
    """The two operations of static grids, written out: a file with them would need a private import to be loaded."""
    ops = quantized_decomposed()

    def quantize(x: Tensor, scale: float, zero: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        return (x * (1.0 / scale)).round().add(zero).clamp(low, high).to(dtype)

    def dequantize(
        codes: Tensor, scale: float, zero: int, low: int, high: int, dtype: torch.dtype, *, out_dtype: Any = None
    ) -> Tensor:
        return (codes.to(torch.float32) - zero) * scale

    return {ops.quantize_per_tensor.default: quantize, ops.dequantize_per_tensor.default: dequantize}
