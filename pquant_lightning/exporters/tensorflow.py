"""A SavedModel of ordinary TensorFlow operations, with a signature for serving."""

import shutil
from pathlib import Path
from typing import Any

from pquant_lightning.backends.base import as_numpy, require
from pquant_lightning.backends.lowering.trace import Traced, quietly
from pquant_lightning.backends.tensorflow import lower_to_tensorflow
from pquant_lightning.exporters.base import PACKED, Exporter, Run


class TensorFlowExporter(Exporter):
    """Weights are `tf.Variable`; inputs and outputs have the names and layouts of the model in PyTorch."""

    is_directory = True
    marker = "saved_model.pb"
    extra = "tensorflow"
    packages = ("tensorflow",)
    bits = PACKED

    def write(self, traced: Traced, path: Path) -> None:
        tf = require("tensorflow", "tensorflow")
        run, weights = lower_to_tensorflow(traced)
        module = tf.Module()
        trained = dict(traced.model.named_parameters())
        module.params = {
            name: tf.Variable(as_numpy(tensor), name=name.replace(".", "/"), trainable=name in trained)
            for name, tensor in weights.items()
        }

        def serve(*inputs: Any) -> dict[str, Any]:
            return dict(zip(traced.outputs, run(module.params, inputs), strict=True))

        function = tf.function(serve, input_signature=signature(traced), autograph=False)
        module.serve = function
        with quietly():
            tf.saved_model.save(module, str(path), signatures=function)
        shutil.rmtree(path / "assets", ignore_errors=True)

    def open(self, path: Path, traced: Traced) -> Run:
        tf = require("tensorflow", "tensorflow")
        model = tf.saved_model.load(str(path))  # which the signature alone would not keep alive

        def run(inputs: Any) -> list[Any]:
            given = {name: tf.constant(as_numpy(x)) for name, x in zip(traced.inputs, inputs, strict=True)}
            found = model.signatures["serving_default"](**given)
            return [found[name].numpy() for name in traced.outputs]

        return run

    def weight_types(self, path: Path) -> dict[str, tuple[str, int]]:
        tf = require("tensorflow", "tensorflow")
        prefix = str(path / "variables" / "variables")
        reader = tf.train.load_checkpoint(prefix)
        found = {}
        for name, shape in reader.get_variable_to_shape_map().items():
            kind = reader.get_variable_to_dtype_map()[name]
            if kind != tf.string:
                count = 1
                for size in shape:
                    count *= size
                found[name] = kind.name, count * kind.size
        return found


def signature(traced: Traced) -> list[Any]:
    """`tf.TensorSpec` of each input, None for open sizes."""
    tf = require("tensorflow", "tensorflow")
    found = []
    for name, tensor in zip(traced.inputs, traced.tensors, strict=True):
        axes = {axis % tensor.dim() for axis in traced.axes[name]}
        shape = [None if i in axes else size for i, size in enumerate(tensor.shape)]
        found.append(tf.TensorSpec(shape, as_numpy(tensor[:0] if tensor.dim() else tensor).dtype, name=name))
    return found
