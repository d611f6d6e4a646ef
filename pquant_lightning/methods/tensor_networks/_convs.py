"""Convolutions of every kind as kernels `(groups, out, in, *k)`, and the structure of the parts of a chain."""

from typing import Any

from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.errors import a_or_an
from pquant_lightning.core.layer_adapter import layer_spec

Spec = dict[str, Any]
CONVS: tuple[type[nn.Module], ...] = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


def is_transposed(layer: Spec) -> bool:
    return "Transpose" in layer["type"]


def to_kernel(weight: Tensor, layer: Spec) -> Tensor:
    """A conv's weight as `(groups, out, in, *k)`, channels per group; `layer` is its structure."""
    kernel = weight.reshape(layer["groups"], -1, *weight.shape[1:])
    return kernel.transpose(1, 2) if is_transposed(layer) else kernel


def from_kernel(kernel: Tensor, layer: Spec) -> Tensor:
    """The inverse of `to_kernel`."""
    return (kernel.transpose(1, 2) if is_transposed(layer) else kernel).flatten(0, 1)


def pointwise(layer: Spec, in_channels: int, out_channels: int, bias: bool = False) -> Spec:
    """A 1x1 conv beside `layer`, never a transposed one; channels are per group."""
    one = [1] * len(layer["kernel_size"])
    plain = {"kernel_size": one, "stride": one, "padding": 0, "dilation": one, "padding_mode": "zeros", "bias": bias}
    spec = {key: value for key, value in {**layer, **plain}.items() if key != "output_padding"}
    groups = layer["groups"]
    channels = {"in_channels": groups * in_channels, "out_channels": groups * out_channels}
    return {**spec, **channels, "type": layer["type"].replace("Transpose", "")}


def spatial(layer: Spec, in_channels: int, out_channels: int, dims: list[int] | None = None) -> Spec:
    """The conv that acts on some of the spatial dimensions as `layer` does on all; channels are per group."""
    groups = layer["groups"]
    spec = {**layer, "in_channels": groups * in_channels, "out_channels": groups * out_channels, "bias": False}
    if dims is not None:
        neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
        for key, value in neutral.items():
            if isinstance(given := layer.get(key), list):
                spec[key] = [given[dim] if dim in dims else value for dim in range(len(given))]
    return spec


def depthwise(layer: Spec, channels: int) -> Spec:
    """The conv that acts as `layer` does on space, on each channel for itself; channels are per group."""
    width = layer["groups"] * channels
    return {**layer, "in_channels": width, "out_channels": width, "groups": width, "bias": False}


def why_no_kernel(layer: nn.Module) -> str | None:
    """Why there is no kernel to separate from the channels; None where there is."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        return f"{a_or_an(type(layer).__name__)} has no kernel; tensor_train and low_rank factorize it"
    if all(size == 1 for size in getattr(layer, "kernel_size", (1,))):
        return "its kernel is a single point, so that its weight is a matrix; low_rank factorizes it"
    out, in_ = to_kernel(weight_of(layer), layer_spec(layer)).shape[1:3]
    if min(out, in_) == 1:
        what = "it has" if layer.groups == 1 else "each group of its channels has"
        return f"{what} a single input or a single output channel, so that there is nothing for channels to share"
    return None
