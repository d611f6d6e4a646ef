"""`.tflite` for LiteRT: 8-bit weights stay integers, and its kernels round the inputs of layers by themselves."""

import re
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.trace import Traced, quietly
from pquant_lightning.backends.tensorflow import lower_to_tensorflow
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.errors import ModelError
from pquant_lightning.exporters.base import Exporter, Run
from pquant_lightning.exporters.tensorflow import signature


class TfliteExporter(Exporter):
    """By TensorFlow's converter, which stores all weights of 1024 values and more in 8 bits where one is."""

    extra = "tensorflow"
    packages = ("tensorflow", "ai_edge_litert")
    bits: ClassVar[dict[int, str]] = {8: "int8"}
    rounds_inputs = True
    least_integers = 1024

    def twin(self, model: nn.Module) -> nn.Module:
        """Without the rounding of inputs, which the runtime's own kernels do."""
        twin = share_copy(model)
        for layer in compressed_layers(twin).values():
            if layer.spec.get("act"):
                layer.spec = {**layer.spec, "act": None, "act_bits": 16}
        return twin

    def write(self, traced: Traced, path: Path) -> None:
        tf = require("tensorflow", "tensorflow")
        run, weights = lower_to_tensorflow(traced, lite=True)
        params = {name: as_numpy(tensor) for name, tensor in weights.items()}

        def serve(*inputs: Any) -> dict[str, Any]:
            return dict(zip(traced.outputs, run(params, inputs), strict=True))

        function = tf.function(serve, input_signature=signature(traced), autograph=False)
        with quietly():
            converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], tf.Module())
            if any("bits" in layer.spec for layer in compressed_layers(traced.model).values()):
                converter.optimizations = [tf.lite.Optimize.DEFAULT]
            try:
                data = converter.convert()
            except Exception as error:  # its type is private
                named = sorted(set(re.findall(r"'(tf\.\w+)' op is neither", str(error))))
                reason = f"no counterpart for {', '.join(named)}" if named else str(error).splitlines()[0]
                raise ModelError(f"TFLite cannot hold {type(traced.model).__name__}: {reason}.") from error
            path.write_bytes(data)

    def open(self, path: Path, traced: Traced) -> Run:
        interpreter = require("ai_edge_litert.interpreter", "tensorflow").Interpreter(model_path=str(path))
        runner = interpreter.get_signature_runner()

        def run(inputs: Any) -> list[Any]:
            given = {name: as_numpy(x) for name, x in zip(traced.inputs, inputs, strict=True)}
            found = runner(**given)
            return [found[name] for name in traced.outputs]

        return run

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        schema = require("ai_edge_litert.schema_py_generated", "tensorflow")
        model = schema.Model.GetRootAs(path.read_bytes(), 0)
        names = {value: name.lower() for name, value in vars(schema.TensorType).items() if isinstance(value, int)}
        found = {}
        for place in range(model.SubgraphsLength()):
            graph = model.Subgraphs(place)
            for i in range(graph.TensorsLength()):
                tensor = graph.Tensors(i)
                size = model.Buffers(tensor.Buffer()).DataLength()
                if size:
                    found[f"{place}/{tensor.Name().decode()}"] = names[tensor.Type()], size
        return found
