"""`.onnx` for onnxruntime: integer layers as operations that it computes in integers."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.trace import Traced, quietly, with_tensors
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.errors import ModelError
from pquant_lightning.exporters._onnx_graph import arrange
from pquant_lightning.exporters._onnx_layers import OnnxForm, QuantizedConv, stored_bits, with_onnx_layers
from pquant_lightning.exporters.base import Exporter, Run

_MOST_FOLDED = 64  # values of constants that are computed with beforehand: sizes are, integer weights are not
_MOST_COMPUTED = 1024  # values of what is so computed, and stored
_MOST_BYTES = 2**31 - 2**20  # of one file in the format of protocol buffers


class OnnxExporter(Exporter):
    """By `torch.onnx`, checked by ONNX's own checker."""

    extra = "onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")
    least_integers = _MOST_FOLDED + 1
    bits: ClassVar[dict[int, str]] = {8: "int8"} | dict.fromkeys(range(2, 8), "MatMulNBits")

    choices: ClassVar[dict[str, tuple[Any, ...]]] = {"target": ("any", "vnni"), "accuracy_level": (4, 0)}

    def __init__(self, **given: Any) -> None:
        self.form = OnnxForm(**given)

    @classmethod
    def chosen(cls, **given: Any) -> Self:
        return cls(**given)

    def described(self, model: nn.Module) -> dict[str, Any]:
        found = {name: (stored_bits(layer, self.form), layer) for name, layer in compressed_layers(model).items()}
        widened = {name: bits for name, (bits, layer) in found.items() if bits and bits > layer.spec["bits"]}
        return {**asdict(self.form), "widened": widened}

    def twin(self, model: nn.Module) -> nn.Module:
        twin = with_onnx_layers(model, self.form)
        return deep_copy(twin).float() if _brain_floats(model) else twin

    def reference(self, traced: Traced, path: Path) -> nn.Module:
        if _brain_floats(traced.model):
            return traced.model
        stored = self.weight_types(path)
        for name, module in traced.traced.named_modules():
            if isinstance(module, QuantizedConv):
                module.rounds_output = f"{name}.out_scale" in stored
        return traced.traced

    def write(self, traced: Traced, path: Path) -> None:
        onnx = require("onnx", "onnx")
        with quietly():
            try:
                made: Any = torch.onnx.export(
                    _in_32_bits(traced).program,
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
            require("onnxscript.optimizer", "onnx").optimize(
                made.model, input_size_limit=_MOST_FOLDED, output_size_limit=_MOST_COMPUTED
            )
        model = made.model_proto
        graph = model.graph
        for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
            del part.metadata_props[:]  # lines of source and the like, which take more room than a small graph
        if model.ByteSize() > _MOST_BYTES:
            raise ModelError(
                f"The model takes {model.ByteSize():,} bytes, and an ONNX file holds 2 GB: export to 'pt2'."
            )
        arrange(graph)
        _shorten(model, _brain_floats(traced.model))
        onnx.checker.check_model(model, full_check=True)
        path.write_bytes(model.SerializeToString())

    def open(self, path: Path, traced: Traced) -> Run:
        runtime = require("onnxruntime", "onnx")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        kept = {found.name for found in session.get_inputs()}

        def run(inputs: Any) -> list[Any]:
            tensors = [x.float() if x.dtype is torch.bfloat16 else x for x in inputs]
            given = {name: as_numpy(x) for name, x in zip(traced.inputs, tensors, strict=True) if name in kept}
            found: list[Any] = session.run(list(traced.outputs), given)
            return found

        return run

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        onnx = require("onnx", "onnx")
        names = onnx.TensorProto.DataType
        graph = onnx.load(path).graph
        return {t.name: (names.Name(t.data_type).lower(), len(t.raw_data)) for t in graph.initializer}


def _brain_floats(model: nn.Module) -> set[str]:
    """Names of the tensors in bfloat16, which onnxruntime stores but hardly computes with."""
    return {name for name, tensor in model.state_dict().items() if getattr(tensor, "dtype", None) is torch.bfloat16}


def _in_32_bits(traced: Traced) -> Traced:
    if not _brain_floats(traced.model):
        return traced
    tensors = [x.float() if x.dtype is torch.bfloat16 else x for x in traced.tensors]
    args, kwargs = with_tensors((traced.args, traced.kwargs), tensors)
    return replace(traced, args=args, kwargs=kwargs)


def _shorten(model: Any, names: set[str]) -> None:
    """Stores tensors of these names in bfloat16, as they were, and casts them where they are used."""
    onnx = require("onnx", "onnx")
    brain = require("ml_dtypes", "onnx").bfloat16
    for tensor in model.graph.initializer:
        if tensor.name in names and tensor.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(tensor).astype(brain)
            short = onnx.helper.make_tensor(
                f"{tensor.name}.bfloat16", onnx.TensorProto.BFLOAT16, values.shape, values.tobytes(), raw=True
            )
            cast = onnx.helper.make_node("Cast", [short.name], [tensor.name], to=onnx.TensorProto.FLOAT)
            tensor.CopyFrom(short)
            model.graph.node.insert(0, cast)


def _reason(error: Exception) -> str:
    """What is at the bottom of the exporter's chain of errors."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return f"{type(error).__name__}: {str(error)[:600]}"
