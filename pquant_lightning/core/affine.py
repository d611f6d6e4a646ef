"""The one quantizer: scales, integer codes, and fake-quantization with a straight-through gradient.

Codes are `round(x / scale + zero_point)`, clamped; the fake-quantized and the integer forms share this one formula, so
that their codes are equal bit for bit.
"""

from typing import Any

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def symmetric_scale(weight: Tensor, bits: int, axis: int = 0) -> Tensor:
    """Scale per channel that puts the largest magnitude on the largest code, so that nothing is clipped.

    Args:
        weight: `(..., channels at axis, ...)`.
        bits: codes lie in [-(2**(bits-1) - 1), 2**(bits-1) - 1].
        axis: the channel dimension.

    Returns:
        float32 `(channels,)`; an all-zero channel gets the smallest positive number.

    >>> symmetric_scale(torch.tensor([[127.0, -1.0], [0.5, -0.25]]), bits=8)
    tensor([1.0000, 0.0039])
    """
    dims = [dim for dim in range(weight.dim()) if dim != axis]
    magnitude = weight.amax(dims).maximum(weight.amin(dims).neg()).float()
    return (magnitude / (2 ** (bits - 1) - 1)).clamp_min(_TINY)


def affine_range(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (both float32 scalars) of the codes 0 .. 2**bits - 1 over a range, widened to hold zero.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018, equation 1 and section 3.
    """
    minimum, maximum = minimum.clamp_max(0.0), maximum.clamp_min(0.0)
    scale = ((maximum - minimum) / (2**bits - 1)).clamp_min(_TINY)
    return scale, (-minimum / scale).round_()


def per_channel(scale: Tensor, dim: int, axis: int = 0) -> Tensor:
    """A `(channels,)` scale shaped to broadcast over a weight of `dim` dimensions."""
    return scale.reshape([-1 if d == axis else 1 for d in range(dim)])


def symmetric_codes(weight: Tensor, scale: Tensor, axis: int = 0) -> Tensor:
    """int8 codes `round(weight / scale)` of a weight; same shape."""
    return (weight.float() / per_channel(scale, weight.dim(), axis)).round_().to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype, axis: int = 0) -> Tensor:
    """`codes * scale` per channel in `dtype`; same shape."""
    return (codes.float() * per_channel(scale, codes.dim(), axis)).to(dtype)


class _FakeQuantizeWeight(torch.autograd.Function):
    """Absolute-maximum scales never clip, so that the straight-through gradient is the identity and needs no mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, axis: int) -> Tensor:
        scale = per_channel(symmetric_scale(weight, bits, axis), weight.dim(), axis)
        return (weight.float() / scale).round_().mul_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_quantize_weight(weight: Tensor, bits: int, axis: int = 0) -> Tensor:
    """Per-channel symmetric fake-quantization; |error| <= scale / 2; gradient: identity (straight-through).

    References:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013 (straight-through).

    >>> fake_quantize_weight(torch.tensor([[1.0, 0.4, -0.2]]), bits=2)
    tensor([[1., 0., -0.]])
    """
    result: Tensor = _FakeQuantizeWeight.apply(weight, bits, axis)
    return result


class _FakeQuantizeActivation(torch.autograd.Function):
    """Values outside the range are clipped and get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, top: int) -> Tensor:
        levels = (x.float() / scale).add_(zero_point)
        ctx.save_for_backward(levels >= -0.5, levels <= top + 0.5)
        return levels.round_().clamp_(0, top).sub_(zero_point).mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        above, below = ctx.saved_tensors
        return grad * above * below, None, None, None


def fake_quantize_activation(x: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """Per-tensor affine fake-quantization over [minimum, maximum]; straight-through inside it, zero gradient outside.

    >>> fake_quantize_activation(torch.tensor([0.1, 0.9, 7.0]), torch.tensor(0.0), torch.tensor(3.0), bits=2)
    tensor([0., 1., 3.])
    """
    scale, zero_point = affine_range(minimum, maximum, bits)
    result: Tensor = _FakeQuantizeActivation.apply(x, scale, zero_point, 2**bits - 1)
    return result
