"""A lowered model as a Keras layer. Import this file only where TensorFlow is installed."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import keras

from pquant_lightning.backends.base import as_numpy
from pquant_lightning.backends.lowering.trace import Traced


class TracedLayer(keras.layers.Layer):  # type: ignore[misc]
    """A traced model with its weights.

    Attributes:
        traced: what it was lowered from.
        params: `keras.Variable` by torch's names; those of torch's float parameters train.
    """

    def __init__(self, traced: Traced, to_function: Any) -> None:
        super().__init__()
        self._to_function = to_function
        trained = {name for name, p in traced.model.named_parameters() if p.is_floating_point()}
        weights = self.lower(traced)
        self.params = {n: self._variable(n, as_numpy(tensor), n in trained) for n, tensor in weights.items()}

    def lower(self, traced: Traced) -> Any:
        """Takes over the graph of a model; returns its weights."""
        self.traced = replace(traced)  # the graph is made anew
        self.function, weights = self._to_function(self.traced)
        return weights

    def _variable(self, name: str, values: Any, trained: bool) -> Any:
        return self.add_weight(
            name=name.replace(".", "_"),
            shape=values.shape,
            dtype=values.dtype.name,
            initializer=lambda shape, dtype=None: keras.ops.convert_to_tensor(values),
            trainable=trained,
            autocast=False,
        )

    def call(self, inputs: Any) -> Any:
        names = self.traced.inputs
        given = [inputs[name] for name in names] if isinstance(inputs, Mapping) else [inputs]
        values = self.function({name: variable.value for name, variable in self.params.items()}, given)
        outputs = self.traced.outputs
        return values[0] if outputs == ("output",) else dict(zip(outputs, values, strict=True))
