"""`.onnx` for onnxruntime: integer layers as operations that it computes in integers."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.trace import Traced, quietly
from pquant_lightning.core.errors import ModelError
from pquant_lightning.exporters._onnx_layers import with_onnx_layers
from pquant_lightning.exporters.base import Exporter, Run

_MOST_FOLDED = 64  # values of constants that are computed beforehand: sizes are, integer weights are not
_MOST_BYTES = 2**31 - 2**20  # of one file in the format of protocol buffers


class OnnxExporter(Exporter):
    """By `torch.onnx`, checked by ONNX's own checker."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    bits: ClassVar[dict[int, str]] = {8: "int8", 4: "MatMulNBits"} | dict.fromkeys((2, 3, 5, 6, 7), "packed")

    def twin(self, model: nn.Module) -> nn.Module:
        return with_onnx_layers(model)

    def write(self, traced: Traced, path: Path) -> None:
        onnx = require("onnx", "onnx")
        program = traced.program
        with quietly():
            try:
                made: Any = torch.onnx.export(
                    program,
                    dynamo=True,
                    verbose=False,
                    optimize=False,
                    input_names=list(traced.inputs),
                    output_names=list(traced.outputs),
                )
            except Exception as error:
                raise ModelError(
                    f"torch.onnx cannot convert {type(traced.model).__name__}: {_reason(error)}"
                ) from error
            require("onnxscript.optimizer", "onnx").optimize(made.model, input_size_limit=_MOST_FOLDED)
        model = made.model_proto
        for part in (*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
            del part.metadata_props[:]  # lines of source, which take more room than a small graph
        if model.ByteSize() > _MOST_BYTES:
            raise ModelError(
                f"The model takes {model.ByteSize():,} bytes, and an ONNX file holds 2 GB: export to 'pt2'."
            )
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())

    def open(self, path: Path, traced: Traced) -> Run:
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kept = {found.name for found in session.get_inputs()}

        def run(inputs: Any) -> list[Any]:
            given = {name: as_numpy(x) for name, x in zip(traced.inputs, inputs, strict=True) if name in kept}
            found: list[Any] = session.run(list(traced.outputs), given)
            return found

        return run

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        onnx = require("onnx", "onnx")
        names = onnx.TensorProto.DataType
        graph = onnx.load(path).graph
        return {t.name: (names.Name(t.data_type).lower(), len(t.raw_data)) for t in graph.initializer}


def _reason(error: Exception) -> str:
    """What is at the bottom of the exporter's chain of errors."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:600]}"
