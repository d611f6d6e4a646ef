"""The layer types that can be quantized, as both their training and their deployed form see them.

A form is torch's layer with its computation as a function of an input and a weight.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

FLOAT = 16  # bits that mean: left in floating point


def layer_config(spec: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the ordinary layer that a spec stands for."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in spec["layer"].items() if key != "type"}


def describe(spec: dict[str, Any]) -> str:
    """Bits of weights and inputs, in words; and why a layer with quantized inputs does not compute in integers."""
    groups = f" in groups of {spec['group_size']}" if spec["group_size"] else ""
    acts = f", {spec['act_bits']}-bit {spec['act']} inputs" if spec["act_bits"] < FLOAT else ""
    why = f" ({spec['kernel']})" if acts and spec["kernel"] != "integer" else ""
    how = "" if spec["rounding"] == "nearest" else f", {spec['rounding']}"
    return f"{spec['bits']}-bit weights{groups}{how}{acts}{why}"


class LinearForm(nn.Linear):
    """How a Linear layer computes from an input and a weight."""

    axis = 0

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


class Conv1dForm(nn.Conv1d):
    """The same of Conv1d."""

    axis = 0

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class Conv2dForm(nn.Conv2d):
    """The same of Conv2d."""

    axis = 0

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class Conv3dForm(nn.Conv3d):
    """The same of Conv3d."""

    axis = 0

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


def _transposed(layer: Any, convolve: Any, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any) -> Tensor:
    dims = len(layer.kernel_size)
    padding = layer._output_padding(
        x, output_size, layer.stride, layer.padding, layer.kernel_size, dims, layer.dilation
    )
    return convolve(x, weight, bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class ConvTranspose1dForm(nn.ConvTranspose1d):
    """The same of ConvTranspose1d; its weight is (in, out/groups, k)."""

    axis = 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        return _transposed(self, F.conv_transpose1d, x, weight, bias, output_size)


class ConvTranspose2dForm(nn.ConvTranspose2d):
    """The same of ConvTranspose2d."""

    axis = 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        return _transposed(self, F.conv_transpose2d, x, weight, bias, output_size)


class ConvTranspose3dForm(nn.ConvTranspose3d):
    """The same of ConvTranspose3d."""

    axis = 1

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, output_size: Any = None) -> Tensor:
        return _transposed(self, F.conv_transpose3d, x, weight, bias, output_size)
