"""Layer types: what can be compressed, how a layer's structure is described, and how users add their own types.

Every method works on ordinary torch layers (`SUPPORTED`), and on layers of other types that compute the same
(`core/look_alikes.py`). A user's own layer type joins by one function that gives an
equivalent ordinary layer: `register_adapter(MyDense, to_linear)`. Layers of packages that need not be installed are
known by their full names.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from pquant_lightning.core.errors import PQuantError, a_or_an
from pquant_lightning.core.look_alikes import ordinary_twin
from pquant_lightning.core.plan import LayerInfo
from pquant_lightning.core.surgery import replace_layer

_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_CONV_TRANSPOSE = (*_CONV[:5], "output_padding", *_CONV[5:])
_EMBEDDING = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

# layer type -> constructor arguments that are attributes of the same name; `bias` is added where the type has one
SUPPORTED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features"),
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
    nn.Embedding: _EMBEDDING,
}
_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
# norms that can be folded away; described and built like layers, and not compressed by themselves
NORMS: dict[type[nn.Module], tuple[str, ...]] = dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _NORM)
_CONSTANT = ("output_padding", "transposed")  # of a convolution, whatever its arguments are
# what a model's own code may read of an ordinary layer or norm, beside its tensors
ATTRIBUTES = tuple(dict.fromkeys([*_CONSTANT, *(n for names in (*SUPPORTED.values(), *NORMS.values()) for n in names)]))
_ATTENTION = ("embed_dim", "num_heads", "dropout", "add_zero_attn", "kdim", "vdim", "batch_first")
RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size")
# layers that hold several weights; methods see their parts (`core/attention.py`, `core/recurrent.py`)
FUSED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: _ATTENTION,
    nn.LSTM: RECURRENT,
    nn.GRU: RECURRENT,
    nn.RNN: (*RECURRENT, "nonlinearity"),
}
_BY_NAME = {cls.__name__: cls for cls in (*SUPPORTED, *NORMS, *FUSED)}
_ADAPTERS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {}


def _transposed_linear(layer: Any) -> nn.Linear:
    """transformers' `Conv1D`, `x @ weight + bias` with a weight (in, out), as a Linear; the bias is shared."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=layer.weight.requires_grad)
    linear.bias = layer.bias
    return linear


# full name of a layer type of another package -> its adapter: nothing is imported for them
_FOREIGN: dict[str, Callable[[Any], nn.Module]] = {"transformers.pytorch_utils.Conv1D": _transposed_linear}


def _adapter_of(layer_type: type[nn.Module]) -> Callable[[Any], nn.Module] | None:
    return _ADAPTERS.get(layer_type) or _FOREIGN.get(full_name(layer_type))


def full_name(layer_type: type) -> str:
    """The name of a type with its module.

    >>> full_name(nn.Linear)
    'torch.nn.modules.linear.Linear'
    """
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


def register_adapter(layer_type: type[nn.Module], to_torch: Callable[[Any], nn.Module] | None = None) -> Any:
    """Teaches every method a new layer type, as a plain call or as a decorator.

    Args:
        layer_type: the exact type (subclasses are not matched: their `forward` may differ).
        to_torch: gives an equivalent ordinary layer (Linear, Conv, ConvTranspose, Embedding); it may share the
            `Parameter`s of the layer.

    Raises:
        PQuantError: `layer_type` is no module class.

    >>> import torch
    >>> class Dense(nn.Module):  # keeps its weight as (in, out)
    ...     def __init__(self, n_in, n_out):
    ...         super().__init__()
    ...         self.kernel = nn.Parameter(torch.randn(n_in, n_out))
    ...     def forward(self, x):
    ...         return x @ self.kernel
    >>> @register_adapter(Dense)
    ... def dense_to_linear(layer):
    ...     linear = nn.Linear(*layer.kernel.shape, bias=False)
    ...     linear.weight = nn.Parameter(layer.kernel.detach().T.contiguous())
    ...     return linear
    >>> LayerAdapter().get_layer_info(Dense(3, 5))["shape"]
    (5, 3)
    """
    if to_torch is None:
        return partial(register_adapter, layer_type)
    if not (isinstance(layer_type, type) and issubclass(layer_type, nn.Module)):
        raise PQuantError(f"register_adapter takes a torch.nn.Module class, got {layer_type!r}.")
    _ADAPTERS[layer_type] = to_torch
    return to_torch


def as_torch(layer: nn.Module) -> nn.Module | None:
    """The layer itself if it is an ordinary one, its adapter's equivalent, or None for an unknown type."""
    if type(layer) in SUPPORTED:
        return layer
    adapter = _adapter_of(type(layer))
    if adapter is None:
        return _look_alike(layer)
    equivalent = adapter(layer)
    if type(equivalent) not in SUPPORTED:
        raise PQuantError(
            f"The adapter of {type(layer).__name__} gave {a_or_an(type(equivalent).__name__)}; it must give one of "
            f"{', '.join(cls.__name__ for cls in SUPPORTED)}."
        )
    if not any(parameter.requires_grad for parameter in layer.parameters()):
        equivalent.requires_grad_(False)
    return equivalent


def _look_alike(layer: nn.Module) -> nn.Module | None:
    """The ordinary layer that a layer of another type computes the same as, with the same parameters."""
    from pquant_lightning.core.compressed_layer import CompressedLayer  # it needs this module

    # a compressed layer may round nothing for a while; attention's own is taken apart together with the attention
    if isinstance(layer, CompressedLayer | NonDynamicallyQuantizableLinear):
        return None
    return next((twin for build in (_as_base, _as_linear) if (twin := ordinary_twin(layer, build)) is not None), None)


def _with_parameters(layer: Any, layer_type: type[nn.Module], arguments: dict[str, Any]) -> nn.Module:
    bias = {} if layer_type is nn.Embedding else {"bias": getattr(layer, "bias", None) is not None}
    new = layer_type(**arguments, **bias, device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        if name not in new._parameters or new.get_parameter(name).shape != parameter.shape:
            raise ValueError(f"{name} of another shape")
        setattr(new, name, parameter)
    return new.train(layer.training)


def _as_base(layer: nn.Module) -> nn.Module | None:
    """A layer of a subclass as one of torch's own class."""
    base = next((cls for cls in SUPPORTED if isinstance(layer, cls)), None)
    try:
        arguments = {name: getattr(layer, name) for name in SUPPORTED[base]} if base else {}
        return None if base is None else _with_parameters(layer, base, arguments)
    except (AttributeError, TypeError, ValueError):  # sizes that are not those of its weight
        return None


def _as_linear(layer: nn.Module) -> nn.Module | None:
    """A layer with a matrix `(out, in)` as a Linear."""
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    try:
        sizes = {"in_features": weight.shape[1], "out_features": weight.shape[0]}
        return _with_parameters(layer, nn.Linear, sizes)
    except ValueError:
        return None


def layer_info(layer: nn.Module) -> LayerInfo:
    """Describes an ordinary layer (`as_torch`)."""
    config = {name: getattr(layer, name) for name in SUPPORTED[type(layer)]}
    if not isinstance(layer, nn.Embedding):
        config["bias"] = layer.bias is not None
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return LayerInfo(type(layer).__name__, tuple(weight.shape), config)


def channel_dim(layer: nn.Module) -> int:
    """The dimension of a layer's input that holds its channels: -1, or before the spatial ones of a convolution."""
    spatial = len(getattr(layer, "kernel_size", ()))
    return -1 - spatial


def layer_spec(layer: nn.Module) -> dict[str, Any]:
    """The structure of an ordinary layer, a norm or a fused layer, as JSON-able data; `build_layer` reads it."""
    if type(layer) in NORMS:
        return {"type": type(layer).__name__, **{name: getattr(layer, name) for name in _NORM}}
    if isinstance(layer, nn.MultiheadAttention):
        own = {name: getattr(layer, name) for name in _ATTENTION}
        biases = {"bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}
        return {"type": type(layer).__name__, **own, **biases}
    if isinstance(layer, nn.RNNBase):
        return {"type": type(layer).__name__, **{name: getattr(layer, name) for name in FUSED[type(layer)]}}
    info = layer_info(layer)
    config = {key: list(value) if isinstance(value, tuple) else value for key, value in info.config.items()}
    return {"type": info.type, **config}


def build_layer(spec: dict[str, Any], **overrides: Any) -> nn.Module:
    """Makes the layer that `layer_spec` described, with some arguments changed; weights are torch's initial ones."""
    config = {**spec, **overrides}
    layer_type = _BY_NAME[config.pop("type")]
    if layer_type in (nn.GRU, nn.RNN):  # they have the attribute, and do not take the argument
        config.pop("proj_size", None)
    return layer_type(**{key: tuple(value) if isinstance(value, list) else value for key, value in config.items()})


def attribute_of(spec: dict[str, Any], name: str) -> Any:
    """One of the `ATTRIBUTES` of the layer that `layer_spec` described.

    Raises:
        AttributeError: such a layer has no attribute of that name.

    >>> attribute_of({"type": "Conv1d", "kernel_size": [3]}, "kernel_size")
    (3,)
    """
    if name in spec:
        value = spec[name]
        return tuple(value) if isinstance(value, list) else value
    if name not in _CONSTANT or "kernel_size" not in spec:
        raise AttributeError(f"a {spec.get('type', 'layer')} has no attribute {name!r}")
    return "Transpose" in spec["type"] if name == "transposed" else (0,) * len(spec["kernel_size"])


def resized_spec(spec: dict[str, Any], shape: Sequence[int]) -> dict[str, Any]:
    """The structure of a layer or norm whose weight has come to another shape by losing channels.

    >>> resized_spec({"type": "Linear", "in_features": 8, "out_features": 6, "bias": True}, (3, 8))["out_features"]
    3
    """
    kind = spec["type"]
    if kind == "Linear":
        return {**spec, "in_features": shape[1], "out_features": shape[0]}
    if kind == "Embedding":
        return {**spec, "num_embeddings": shape[0], "embedding_dim": shape[1]}
    if "num_features" in spec:
        return {**spec, "num_features": shape[0]}
    first, second = ("in_channels", "out_channels") if "Transpose" in kind else ("out_channels", "in_channels")
    groups = spec["groups"] * shape[0] // spec[first]  # a group goes as a whole
    groups = groups if spec["groups"] > 1 else 1
    return {**spec, first: shape[0], second: shape[1] * groups, "groups": groups}


def why_unsupported(layer: nn.Module) -> str | None:
    """Why a module that holds a matrix cannot be compressed; None for containers, norms and other small things."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "is a TorchScript module, whose code is fixed: compress the module before scripting it"
    if is_parametrized(layer):
        return "its weight is computed by a parametrization: remove_parametrizations first"
    own = [parameter for _, parameter in layer.named_parameters(recurse=False)]
    if any(is_lazy(parameter) for parameter in own):
        return "is a lazy layer that is not built yet: run one batch through the model first"
    if all(parameter.dim() < 2 for parameter in own):
        return None
    kind = type(layer).__name__
    if next(layer.children(), None) is not None:
        names = [name for name, parameter in layer.named_parameters(recurse=False) if parameter.dim() > 1]
        shown = ", ".join(map(repr, names))
        return (
            f"the weights that it holds itself ({shown}) belong to no layer and stay as they are; if {kind} "
            "is a layer, register_adapter makes it known"
        )
    return f"no adapter for the type {full_name(type(layer))} (register_adapter adds one)"


class LayerAdapter:
    """Detects, describes and replaces layers (the specification's three methods).

    Args:
        backend: accepted as in the specification; layers are torch modules on every backend.

    >>> adapter = LayerAdapter()
    >>> adapter.is_compressible(nn.ReLU()), adapter.get_layer_info(nn.Linear(4, 2))["type"]
    (False, 'linear')
    """

    def __init__(self, backend: object = None) -> None:
        self.backend = backend

    def is_compressible(self, layer: nn.Module) -> bool:
        """Whether it is of a supported or registered type, made of such layers, or computes the same as one."""
        known = type(layer) in SUPPORTED or type(layer) in FUSED or _adapter_of(type(layer)) is not None
        return known or _look_alike(layer) is not None

    def get_layer_info(self, layer: nn.Module) -> dict[str, Any] | None:
        """Type (lower case), constructor arguments and weight shape; None for others.

        The shape is that of attention's output projection, and of a recurrent layer's first input product.
        """
        if isinstance(layer, nn.MultiheadAttention) and type(layer) in FUSED:
            spec = layer_spec(layer)
            return {**spec, "type": spec["type"].lower(), "shape": tuple(layer.out_proj.weight.shape)}
        if isinstance(layer, nn.RNNBase) and type(layer) in FUSED:
            spec = layer_spec(layer)
            return {**spec, "type": spec["type"].lower(), "shape": tuple(layer.get_parameter("weight_ih_l0").shape)}
        ordinary = as_torch(layer)
        if ordinary is None:
            return None
        info = layer_info(ordinary)
        return {"type": info.type.lower(), **info.config, "shape": info.shape}

    def replace_layer(self, model: nn.Module, old_layer_name: str, new_layer: nn.Module) -> None:
        """Puts `new_layer` in place of the named one, everywhere that layer is used.

        Raises:
            PQuantError: no layer has that name, or it is the model itself.
        """
        replace_layer(model, old_layer_name, new_layer)
