"""The backend of TensorFlow: Keras layers, and functions of ordinary TensorFlow operations."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pquant_lightning.backends.base import Backend, Weights, as_numpy, checked_weights, example_of, require
from pquant_lightning.backends.lowering.program import to_function
from pquant_lightning.backends.lowering.trace import Traced, trace
from pquant_lightning.backends.pytorch import PyTorchBackend, stored_names
from pquant_lightning.core.errors import OptionError


def lower_to_tensorflow(traced: Traced, lite: bool = False) -> tuple[Callable[..., list[Any]], dict[str, torch.Tensor]]:
    """A traced model as a function over TensorFlow's tensors, `function(params, inputs)`, and its weights.

    With `lite` only of operations that TFLite has.
    """
    require("tensorflow", "tensorflow")
    from pquant_lightning.backends.lowering.tensorflow_namespace import TensorFlowNamespace

    return to_function(traced.program, TensorFlowNamespace(lite))


def to_keras(model: nn.Module, example_inputs: Any) -> Any:
    """A model as a Keras layer (`keras.layers.Layer`), to be used in a `keras.Model`; its float parameters train.

    It takes one tensor, or a dict by the names of forward's parameters, and gives one tensor, or a dict by name.

    Raises:
        BackendUnavailable: TensorFlow is not installed.
        OptionError: Keras runs on another backend.
        ModelError: the model cannot be traced.
        UnsupportedOperationError: it has operations without a counterpart.
    """
    require("tensorflow", "tensorflow")
    keras = require("keras", "tensorflow")
    if keras.backend.backend() != "tensorflow":
        raise OptionError(
            f"Keras runs on {keras.backend.backend()!r} here: set KERAS_BACKEND=tensorflow before keras is imported."
        )
    from pquant_lightning.backends._keras import TracedLayer

    return TracedLayer(trace(model, example_inputs), lower_to_tensorflow)


class TensorFlowBackend(Backend):
    """Layers are `keras.layers.Layer`, tensors `tf.Tensor`."""

    def __init__(self) -> None:
        require("tensorflow", "tensorflow")
        require("keras", "tensorflow")

    def from_torch(self, module: nn.Module, example_inputs: Any = None) -> Any:
        return to_keras(module, example_of(module) if example_inputs is None else example_inputs)

    def get_weights(self, layer: Any) -> Weights:
        return {name: as_numpy(layer.params[name]) for name in stored_names(layer.traced.model)}

    def set_weights(self, layer: Any, weights: Mapping[str, Any]) -> None:
        checked = checked_weights(self.get_weights(layer), weights)
        PyTorchBackend().set_weights(layer.traced.model, checked)
        for name, values in checked.items():
            layer.params[name].assign(values)
        layer.lower(layer.traced)  # some weights, the grid of inputs among them, are numbers in the graph

    def forward(self, layer: Any, x: Any) -> Any:
        return layer(as_numpy(x) if isinstance(x, torch.Tensor) else x)
