"""The backend of JAX: pure functions with a pytree of parameters, flax NNX modules, and what `jax.export` writes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pquant_lightning.backends.base import Backend, Weights, as_numpy, checked_weights, example_of, require
from pquant_lightning.backends.lowering.program import to_function
from pquant_lightning.backends.lowering.trace import Axes, Traced, trace
from pquant_lightning.backends.pytorch import PyTorchBackend, stored_names
from pquant_lightning.core._private import pytree

JaxFunction = Callable[..., Any]


def to_jax(
    model: nn.Module, example_inputs: Any, dynamic_axes: Axes | None = None
) -> tuple[JaxFunction, dict[str, Any]]:
    """A model as a pure function in JAX, with its parameters.

    Args:
        model: finalized or not; not touched.
        example_inputs: what `forward` takes: a tensor, a tuple or a dict.
        dynamic_axes: see `export_model`; a function that is not exported runs on any batch anyway.

    Returns:
        `function(params, *args, **kwargs)`, which takes what `forward` takes, as arrays, and gives an array, or a dict
        of arrays by name where the model gives several; and the parameters, buffers and constants, `jax.Array` by
        torch's names, without counters that it does not read. Integer weights stay integers; a tensor with several
        names has the first.

    Raises:
        BackendUnavailable: JAX is not installed.
        ModelError: the model cannot be traced.
        UnsupportedOperationError: it has operations without a counterpart.
    """
    traced = trace(model, example_inputs, dynamic_axes)
    function, params = lower_to_jax(traced)
    unread = {name for name, array in params.items() if array.dtype.kind in "iu" and name not in traced.used}
    return function, {name: array for name, array in params.items() if name not in unread}


def lower_to_jax(traced: Traced) -> tuple[JaxFunction, dict[str, Any]]:
    """The same of a model that is traced already."""
    require("jax", "jax")
    from pquant_lightning.backends.lowering.jax_namespace import JaxNamespace

    ns = JaxNamespace()
    run, weights = to_function(traced.program, ns)
    params = {name: ns.asarray(as_numpy(tensor)) for name, tensor in weights.items()}

    def function(params: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        arrays = [value for value in pytree.tree_leaves(traced.ordered(args, kwargs)) if ns.is_array(value)]
        if len(arrays) != len(traced.inputs):
            raise TypeError(f"The model takes {', '.join(traced.inputs)}; got {len(arrays)} arrays.")
        return named(traced, run(params, arrays))

    return function, params


def named(traced: Traced, values: list[Any]) -> Any:
    """One output as it is, several as a dict by name."""
    return values[0] if traced.outputs == ("output",) else dict(zip(traced.outputs, values, strict=True))


def to_nnx(model: nn.Module, example_inputs: Any) -> Any:
    """A model as a `flax.nnx.Module`; float parameters of torch are `nnx.Param` and train, the rest `nnx.Variable`.

    Raises:
        BackendUnavailable: flax is not installed.
        ModelError: the model cannot be traced.
        UnsupportedOperationError: it has operations without a counterpart.
    """
    require("flax.nnx", "jax")
    from pquant_lightning.backends._nnx import TracedModule

    traced = trace(model, example_inputs)
    function, params = lower_to_jax(traced)
    trained = {name for name, p in traced.model.named_parameters() if p.is_floating_point()}
    return TracedModule(function, params, trained)


class JaxLayer:
    """A layer of the JAX backend: a pure function, jitted, and its parameters.

    Attributes:
        module: what it was lowered from.
        function: `function(params, x)`.
        params: `jax.Array` by torch's names.
    """

    def __init__(self, module: nn.Module, example_inputs: Any) -> None:
        self.example_inputs = example_inputs
        self.lower(module)

    def lower(self, module: nn.Module) -> None:
        """Takes over a module."""
        import jax

        traced = trace(module, self.example_inputs)
        self.module = traced.model
        function, self.params = lower_to_jax(traced)
        self.function = jax.jit(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.params, *args, **kwargs)


class JAXBackend(Backend):
    """Layers are `JaxLayer`, tensors `jax.Array`."""

    def __init__(self) -> None:
        require("jax", "jax")

    def from_torch(self, module: nn.Module, example_inputs: Any = None) -> JaxLayer:
        return JaxLayer(module, example_of(module) if example_inputs is None else example_inputs)

    def get_weights(self, layer: JaxLayer) -> Weights:
        return {name: as_numpy(layer.params[name]) for name in stored_names(layer.module)}

    def set_weights(self, layer: JaxLayer, weights: Mapping[str, Any]) -> None:
        checked = checked_weights(self.get_weights(layer), weights)
        PyTorchBackend().set_weights(layer.module, checked)
        layer.lower(layer.module)  # some weights, the grid of inputs among them, are numbers in the graph

    def forward(self, layer: JaxLayer, x: Any) -> Any:
        return layer(as_numpy(x) if isinstance(x, torch.Tensor) else x)
