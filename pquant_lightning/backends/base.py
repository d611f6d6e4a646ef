"""What every backend offers, where it comes from, and what is said when its framework is not installed."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer
from pquant_lightning.core.errors import OptionError, PQuantError, known
from pquant_lightning.core.layer_adapter import SUPPORTED

Weights = dict[str, numpy.ndarray[Any, Any]]


class BackendUnavailable(PQuantError, ImportError):  # noqa: N818 (the specification's kind of name)
    """A framework that is asked for is not installed; the message has the command that installs it."""


def require(module: str, extra: str) -> Any:
    """Imports a module of an optional package.

    Raises:
        BackendUnavailable: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendUnavailable(
            f"This needs {module.partition('.')[0]}, which is not installed ({error}). Install it with:\n"
            f'    pip install "pquant-lightning[{extra}]"'
        ) from error


class Backend(ABC):
    """Layers in a framework, with weights in torch's names and layouts, so that they move between frameworks."""

    def create_layer(self, layer_type: str, config: Mapping[str, Any]) -> Any:
        """A layer with fresh weights.

        Args:
            layer_type: the name of a layer of torch ("linear", "conv2d", "embedding", "layer_norm", ...), or of a
                compressed kind ("low_rank_linear", "tensor_train_linear", "int_linear", ...).
            config: its arguments, as torch's; for a compressed kind its spec.

        Raises:
            OptionError: unknown type or argument.
        """
        return self.from_torch(torch_layer(layer_type, config))

    @abstractmethod
    def from_torch(self, module: nn.Module, example_inputs: Any = None) -> Any:
        """The layer or model of this framework that computes what a module of torch does.

        Args:
            module: a layer or a model, finalized or not.
            example_inputs: what its forward takes; for single layers it is known.
        """

    @abstractmethod
    def get_weights(self, layer: Any) -> Weights:
        """Weights by torch's names, in torch's layouts."""

    @abstractmethod
    def set_weights(self, layer: Any, weights: Mapping[str, Any]) -> None:
        """Replaces all weights.

        Raises:
            OptionError: a name is missing or unknown, or a shape or the kind of number is another.
        """

    @abstractmethod
    def forward(self, layer: Any, x: Any) -> Any:
        """What the layer gives for an input."""


def get_backend(framework: str = "pytorch") -> Backend:
    """The backend of a framework: "pytorch", "tensorflow" or "jax".

    Raises:
        OptionError: there is no such backend.
        BackendUnavailable: its framework is not installed.

    >>> layer = get_backend("pytorch").create_layer("linear", {"in_features": 4, "out_features": 2})
    >>> sorted(get_backend("pytorch").get_weights(layer))
    ['bias', 'weight']
    """
    if framework not in _BACKENDS:
        raise OptionError(f"There is no backend {framework!r}. {known(framework, _BACKENDS)}")
    module, name = _BACKENDS[framework]
    made: Backend = getattr(importlib.import_module(f"pquant_lightning.backends.{module}"), name)()
    return made


_BACKENDS = {
    "pytorch": ("pytorch", "PyTorchBackend"),
    "tensorflow": ("tensorflow", "TensorFlowBackend"),
    "jax": ("jax", "JAXBackend"),
}

_NORMS = {
    "batch_norm1d": nn.BatchNorm1d,
    "batch_norm2d": nn.BatchNorm2d,
    "batch_norm3d": nn.BatchNorm3d,
    "layer_norm": nn.LayerNorm,
    "rms_norm": nn.RMSNorm,
    "group_norm": nn.GroupNorm,
}


def layer_types() -> dict[str, type[nn.Module]]:
    """The layers that `create_layer` makes, by their names."""
    names = {cls.__name__: cls for cls in SUPPORTED}
    return {_snake(name): cls for name, cls in names.items()} | _NORMS | dict(CompressedLayer.kinds)


def _snake(name: str) -> str:
    """ConvTranspose2d as conv_transpose2d."""
    return "".join(f"_{c.lower()}" if c.isupper() and i else c.lower() for i, c in enumerate(name))


def torch_layer(layer_type: str, config: Mapping[str, Any]) -> nn.Module:
    """A layer of torch, or of ours, by the name of its type.

    Raises:
        OptionError: unknown type, or arguments that it does not take.
    """
    types = layer_types()
    if layer_type not in types:
        raise OptionError(f"There is no layer type {layer_type!r}. {known(layer_type, types)}")
    cls = types[layer_type]
    try:
        if issubclass(cls, CompressedLayer):
            return _with_fresh_weights(CompressedLayer.build({**config, "kind": layer_type, "by": "backend"}, None))
        return cls(**config)
    except (TypeError, KeyError) as error:
        raise OptionError(
            f"A layer {layer_type!r} cannot be made from {dict(config)!r}: {_what_is_wrong(error)}."
        ) from error


def _what_is_wrong(error: TypeError | KeyError) -> str:
    return f"it has no {error.args[0]!r}" if isinstance(error, KeyError) else str(error)


def _with_fresh_weights(layer: CompressedLayer) -> CompressedLayer:
    """Small random parameters; codes of zero on grids with steps of one."""
    state = layer.state_dict()
    parameters = dict(layer.named_parameters())
    for name, tensor in state.items():
        if name in parameters:
            nn.init.normal_(tensor, std=0.02)
        elif isinstance(tensor, Tensor) and not name.endswith("_extra_state"):
            tensor.fill_(1 if tensor.is_floating_point() else 0)
    layer.load_state_dict(state)
    return layer


def checked_weights(have: Mapping[str, Any], given: Mapping[str, Any]) -> Weights:
    """The given weights as NumPy arrays, if they fit.

    Raises:
        OptionError: a name is missing or unknown, or a shape or the kind of number is another.
    """
    for name in given:
        if name not in have:
            raise OptionError(f"The layer has no weight {name!r}. {known(name, have)}")
    found = {}
    for name, old in have.items():
        if name not in given:
            raise OptionError(f"The weight {name!r} is missing: give all of {', '.join(map(repr, have))}.")
        new = as_numpy(given[name])
        if tuple(new.shape) != tuple(old.shape):
            raise OptionError(f"The weight {name!r} has shape {tuple(old.shape)}, got {tuple(new.shape)}.")
        if _is_integer(new) != _is_integer(old):
            raise OptionError(f"The weight {name!r} is of type {old.dtype}, got {new.dtype}.")
        found[name] = new
    return found


def _is_integer(values: Any) -> bool:
    name = str(values.dtype)
    return "int" in name


def as_numpy(values: Any) -> numpy.ndarray[Any, Any]:
    """A tensor of torch, or what NumPy takes, as a NumPy array; bfloat16 with the type of `ml_dtypes`."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        if values.dtype is torch.bfloat16:
            return values.contiguous().view(torch.int16).numpy().view(require("ml_dtypes", "jax").bfloat16)
        return values.numpy()
    return numpy.asarray(values)


def example_of(module: nn.Module) -> Any:
    """Inputs of the right shape for a single layer.

    Raises:
        OptionError: it is no single layer that is known here.
    """
    spec = module.spec["layer"] if isinstance(module, CompressedLayer) and "layer" in module.spec else vars(module)
    if "num_embeddings" in spec:
        return torch.zeros(2, 3, dtype=torch.long)
    if "in_features" in spec:
        return torch.zeros(2, spec["in_features"])
    if "in_channels" in spec:
        window = [d * (k - 1) + 4 for k, d in zip(spec["kernel_size"], spec["dilation"], strict=True)]
        return torch.zeros(2, spec["in_channels"], *window)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return torch.zeros(2, *module.normalized_shape)
    if isinstance(module, nn.GroupNorm):
        return torch.zeros(2, module.num_channels, 3)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
        return torch.zeros(2, module.num_features, *[3] * {"1": 0, "2": 2, "3": 3}[type(module).__name__[-2]])
    raise OptionError(f"Give example_inputs: what the forward of {type(module).__name__} takes is not known.")
