"""The one quantizer: scales, integer codes, packing, and fake-quantization with its gradients.

A code is `round(x / scale) + zero_point`, clamped; every form (fake-quantized, integer, exported) computes it by this
one formula, so that codes are equal bit for bit. A weight is quantized in blocks `(channels, groups, values)`: one
group is a scale per channel, one channel and one group is a scale per tensor.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pquant_lightning.core._private import int_mm

_TINY = torch.finfo(torch.float32).tiny
_CACHED = 2**17  # values that are searched at a time: half a megabyte
INT32_PRODUCTS = (2**31 - 1) // (128 * 127)  # of an input code in [-128, 127] and a weight code in [-127, 127]
_PART = 2**16  # of a longer sum, a multiple of 8 as CUDA asks for
_PLANES = (4, 2, 1)  # a code of b bits is stored in planes whose widths add up to b; each divides a byte

Scalar = float | Tensor  # a python number, or a tensor of shape () where reading it would stall the device


# -- scales ----------------------------------------------------------------------------------------------------------


def blocks(weight: Tensor, axis: int | None = 0, group_size: int | None = None) -> Tensor:
    """The weight as float32 `(channels, groups, values)`; a view where its layout allows one.

    Args:
        weight: any shape.
        axis: the channel dimension; None takes the whole tensor as one block.
        group_size: values per group along the flattened other dimensions, which it must divide; None = one group.

    >>> blocks(torch.zeros(6, 4, 3), group_size=4).shape
    torch.Size([6, 3, 4])
    """
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    return rows.float().unflatten(1, (-1, group_size or rows.shape[1]))


def unblock(values: Tensor, shape: torch.Size, axis: int | None = 0) -> Tensor:
    """The inverse of `blocks`: `(channels, groups, values)` to `shape`."""
    if axis is None or axis == 0:
        return values.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return values.reshape(moved).movedim(0, axis)


def top_code(bits: int) -> int:
    """The largest symmetric code; codes lie in [-top, top]."""
    return int(2 ** (bits - 1)) - 1


def symmetric_scale(values: Tensor, bits: int) -> Tensor:
    """Scale per block that puts the largest magnitude on the largest code, so that nothing is clipped.

    Args:
        values: `(channels, groups, values)`.
        bits: 2 to 8.

    Returns:
        float32 `(channels, groups)`; an all-zero block gets the smallest normal number.

    >>> symmetric_scale(blocks(torch.tensor([[127.0, -1.0], [0.5, -0.25]])), bits=8)
    tensor([[1.0000],
            [0.0039]])
    """
    magnitude = values.amax(-1).maximum(values.amin(-1).neg())
    return (magnitude / top_code(bits)).clamp_min(_TINY)


def mse_scale(values: Tensor, bits: int, candidates: int = 40) -> Tensor:
    """Scale per block with the least squared error among shrunk versions of `symmetric_scale`; same shapes.

    References:
        Choukroun et al., "Low-bit Quantization of Neural Networks for Efficient Inference", 2019, section 3 (OMSE).

    >>> outlier = blocks(torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.2]]))
    >>> mse_scale(outlier, bits=2) < symmetric_scale(outlier, bits=2)
    tensor([[True]])
    """
    if values.is_meta:  # a plan only counts bytes, and operations on "meta" are slow
        return symmetric_scale(values, bits)

    def of(part: Tensor) -> Tensor:
        widest = symmetric_scale(part, bits)
        best, least = widest, torch.full_like(widest, torch.inf)
        for step in range(candidates):
            scale = widest * (1 - step / (candidates + 2))
            error = (symmetric_codes(part, scale, bits).mul_(scale[..., None]).sub_(part)).square_().sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return best

    return torch.cat([of(part) for part in pieces(values)])


def mse_range(values: Tensor, bits: int, candidates: int = 14) -> tuple[Tensor, Tensor]:
    """Scale and zero point per block, with the least squared error among shrunk versions of the block's own range.

    Args:
        values: `(channels, groups, values)`.
        bits: 2 to 8.
        candidates: shares of the range that are tried.

    Returns:
        float32 `(channels, groups)` each; the zero point is a whole code, for codes -2**(bits-1) .. 2**(bits-1) - 1.

    >>> shifted = blocks(torch.tensor([[1.0, 1.4, 1.8, 0.0]]))
    >>> scale, zero = mse_range(shifted, bits=2)
    >>> (grid_codes(shifted, scale, zero, 2) - zero[..., None]) * scale[..., None]
    tensor([[[1.2000, 1.2000, 1.8000, 0.0000]]])
    """

    def of(part: Tensor) -> tuple[Tensor, Tensor]:
        low, high = part.amin(-1).clamp_max(0.0), part.amax(-1).clamp_min(0.0)
        best = least = torch.zeros(0)
        for step in range(candidates):
            share = 1 - step / (1.7 * candidates)
            grid = torch.stack(affine_scale(low * share, high * share, bits))
            grid[1] -= 2 ** (bits - 1)
            levels = grid_codes(part, grid[0], grid[1], bits).sub_(grid[1][..., None])
            error = levels.mul_(grid[0][..., None]).sub_(part).square_().sum(-1)
            best = grid if step == 0 else torch.where(error < least, grid, best)
            least = error if step == 0 else torch.minimum(error, least)
        return best[0], best[1]

    scales, zeros = zip(*(of(part) for part in pieces(values)), strict=True)
    return torch.cat(scales), torch.cat(zeros)


def pieces(values: Tensor) -> tuple[Tensor, ...]:
    """Blocks `(channels, groups, values)` in parts along the channels that stay in a processor's cache."""
    return values.split(max(1, _CACHED * len(values) // max(values.numel(), 1)))


def affine_scale(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point (float32, shaped as the limits) of the codes 0 .. 2**bits - 1, over a range widened to zero.

    References:
        Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
        Inference", 2018, equation 1 and section 3.
    """
    minimum, maximum = minimum.float().clamp_max(0.0), maximum.float().clamp_min(0.0)
    scale = ((maximum - minimum) / (2**bits - 1)).clamp_min(_TINY)
    return scale, (-minimum / scale).round_()


# -- codes -----------------------------------------------------------------------------------------------------------


def symmetric_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Float codes in [-top, top] of blocks `(channels, groups, values)` with scales `(channels, groups)`."""
    top = top_code(bits)
    return (values * scale.reciprocal()[..., None]).round_().clamp_(-top, top)


def grid_codes(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Float codes of blocks: symmetric ones where `zero` is None, else `round(values / scale + zero)`.

    Args:
        values: `(channels, groups, values)`.
        scale: `(channels, groups)`.
        zero: `(channels, groups)`, the code that stands for zero, which may lie between two codes; or None.
        bits: 2 to 8.
    """
    if zero is None:
        return symmetric_codes(values, scale, bits)
    low = -(2.0 ** (bits - 1))
    return (values * scale.reciprocal()[..., None]).add_(zero[..., None]).round_().clamp_(low, -low - 1)


def dequantize(codes: Tensor, scale: Tensor, axis: int | None = 0, zero: Tensor | None = None) -> Tensor:
    """`(codes - zero) * scale` in float32: codes of a weight's shape, scales and zero points `(channels, groups)`."""
    values = blocks(codes, axis, None if scale.shape[1] == 1 else codes.numel() // scale.numel())
    levels = values if zero is None else values - zero.float()[..., None]
    return unblock(levels * scale[..., None], codes.shape, axis)


def affine_codes(x: Tensor, inverse: Scalar, zero_point: Scalar, top: int) -> Tensor:
    """Codes 0 .. top of a float tensor as floats: `round(x * inverse) + zero_point`, clamped; broadcasts."""
    return (x.float() * inverse).round_().add_(zero_point).clamp_(0, top)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of 2 to 7 bits without gaps, row by row.

    Args:
        codes: `(rows, values)`, in [-2**(bits-1), 2**(bits-1) - 1].
        bits: 2 to 7.

    Returns:
        uint8 `(rows, bytes)`: bit planes of width 4, 2 and 1 (those that add up to `bits`, low bits first), each of
        `ceil(values * width / 8)` bytes with the first value in the lowest bits.

    >>> pack(torch.tensor([[-2, -1, 0, 1]]), bits=2)
    tensor([[228]], dtype=torch.uint8)
    """
    unsigned = codes.to(torch.int32) + 2 ** (bits - 1)
    planes = []
    for width in _widths(bits):
        per_byte = 8 // width
        values = torch.nn.functional.pad(unsigned % 2**width, (0, -unsigned.shape[1] % per_byte))
        weights = torch.tensor([2 ** (width * place) for place in range(per_byte)], device=codes.device)
        planes.append((values.unflatten(1, (-1, per_byte)) * weights).sum(-1).to(torch.uint8))
        unsigned = unsigned // 2**width
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 `(rows, bytes)` to int8 `(rows, count)`.

    >>> unpack(torch.tensor([[228]], dtype=torch.uint8), count=3, bits=2)
    tensor([[-2, -1,  0]], dtype=torch.int8)
    """
    total, start, place = None, 0, 0
    for width in _widths(bits):
        per_byte = 8 // width
        size = -(-count // per_byte)
        plane = packed[:, start : start + size].to(torch.int32)
        values = torch.stack([plane // 2 ** (width * i) % 2**width for i in range(per_byte)], dim=-1)
        values = values.flatten(1)[:, :count] * 2**place
        total = values if total is None else total + values
        start, place = start + size, place + width
    assert total is not None
    return (total - 2 ** (bits - 1)).to(torch.int8)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return sum(-(-count * width // 8) for width in _widths(bits))


def _widths(bits: int) -> list[int]:
    return [width for width in _PLANES if bits & width]


# -- grids of activations --------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """A per-tensor affine grid: `scale * (code - zero_point)`, codes 0 .. top; `inverse` is 1 / scale in float32."""

    scale: Scalar
    inverse: Scalar
    zero_point: Scalar
    top: int

    @property
    def limits(self) -> tuple[Any, Any]:
        """Values beyond these are clipped: half a step outside the range."""
        return self.scale * (-self.zero_point - 0.5), self.scale * (self.top - self.zero_point + 0.5)


def make_grid(scale: Tensor, zero_point: Tensor, bits: int) -> Grid:
    """A grid of float32 tensors of shape (); of python numbers on the CPU, where reading costs nothing."""
    values = torch.stack([scale, scale.reciprocal(), zero_point]).detach()
    numbers = values.unbind() if values.is_cuda or torch.compiler.is_compiling() else values.tolist()
    return Grid(numbers[0], numbers[1], numbers[2], 2**bits - 1)


# -- fake-quantization -----------------------------------------------------------------------------------------------


class _RoundWeight(torch.autograd.Function):
    """Absolute-maximum scales never clip, so that the straight-through gradient is the identity and needs no mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, axis: int | None) -> Tensor:
        values = blocks(weight, axis)
        scale = symmetric_scale(values, bits)
        codes = (values * scale.reciprocal()[..., None]).round_()
        return unblock(codes.mul_(scale[..., None]), weight.shape, axis).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def fake_quantize_weight(weight: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """Per-channel symmetric fake-quantization; |error| <= scale / 2; gradient: identity (straight-through).

    References:
        Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013 (straight-through).

    >>> fake_quantize_weight(torch.tensor([[1.0, 0.4, -0.2]]), bits=2)
    tensor([[1., 0., -0.]])
    """
    result: Tensor = _RoundWeight.apply(weight, bits, axis)
    return result


class _RoundActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Grid, clips: bool) -> Tensor:
        scale, inverse, zero_point, top = grid
        low: Any = -zero_point
        high: Any = top - zero_point
        ctx.limits = grid.limits if clips else None
        ctx.save_for_backward(x if clips else None)
        levels = (x.float() * inverse).round_().clamp_(low, high)
        return levels.mul_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return (grad if x is None else _inside(grad, x, *ctx.limits)), None, None


def _inside(grad: Tensor, x: Tensor, low: Scalar, high: Scalar) -> Tensor:
    """The gradient where low < x < high, else zero."""
    if isinstance(low, Tensor):
        return grad.where((x > low) & (x < high), 0.0)
    result: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)  # one pass
    return result


def fake_quantize_activation(x: Tensor, grid: Grid, clips: bool = True) -> Tensor:
    """Per-tensor affine fake-quantization; straight-through inside the grid, zero gradient outside.

    Args:
        x: floating, any shape.
        grid: where its values go.
        clips: False where no value lies outside the grid, which saves the mask.

    >>> grid = make_grid(torch.tensor(1.0), torch.tensor(0.0), bits=2)
    >>> fake_quantize_activation(torch.tensor([0.1, 0.9, 7.0]), grid)
    tensor([0., 1., 3.])
    """
    result: Tensor = _RoundActivation.apply(x, grid, clips)
    return result


class _LearnedWeight(torch.autograd.Function):
    """Keeps one tensor for the backward: the slope d(output)/d(scale) of each value.

    The slope is `round(v) - v` for v = weight / scale inside the range, at most 1/2 in magnitude, and the end code
    outside, at least 1: so it also says what was clipped.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, bits: int, axis: int | None) -> Tensor:
        top = float(top_code(bits))
        positive = scale.float().abs().clamp_min(_TINY)
        slope = blocks(weight, axis) * positive.reciprocal()[..., None]
        codes = slope.clamp(-top, top).round_()
        torch.ops.aten.hardtanh_backward(slope, slope, -top, top, grad_input=slope)
        torch.sub(codes, slope, out=slope)
        ctx.save_for_backward(slope, scale)
        ctx.options = top, axis
        return unblock(codes.mul_(positive[..., None]), weight.shape, axis).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        slope, scale = ctx.saved_tensors
        top, axis = ctx.options
        upstream = blocks(grad, axis, slope.shape[2])
        inside = _inside(upstream, slope, -0.75, 0.75)
        rows = torch.bmm(upstream.flatten(0, 1).unsqueeze(1), slope.flatten(0, 1).unsqueeze(2))  # no large buffer
        total = rows.reshape(scale.shape) * scale.sign() * (slope.shape[2] * top) ** -0.5
        return unblock(inside, grad.shape, axis).to(grad.dtype), total.to(scale.dtype), None, None


def learned_fake_quantize_weight(weight: Tensor, scale: Tensor, bits: int, axis: int | None = 0) -> Tensor:
    """Symmetric fake-quantization with a learned scale per block.

    Args:
        weight: any shape.
        scale: `(channels, groups)`, a parameter; its gradient is scaled by 1 / sqrt(values * top).
        bits: 2 to 8.
        axis: the channel dimension.

    References:
        Esser et al., "Learned Step Size Quantization", 2020, equations 1 to 3 and section 2.2. We differ: a scale per
        channel or group instead of per layer.
    """
    result: Tensor = _LearnedWeight.apply(weight, scale, bits, axis)
    return result


class _LearnedActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid, rounding: bool) -> Tensor:
        ratio = x.float() * grid.inverse
        low: Any = -grid.zero_point
        high: Any = grid.top - grid.zero_point
        codes = ratio.clamp(low, high).round_()
        ctx.save_for_backward(ratio, codes, scale)
        ctx.options = grid, low, high, rounding
        return (codes * grid.scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        ratio, codes, scale = ctx.saved_tensors
        grid, low, high, rounding = ctx.options
        upstream = grad.float()
        inside = _inside(upstream, ratio, low, high)
        share = (max(ratio.numel(), 1) * grid.top) ** -0.5
        slope = ((upstream * codes).sum() - (inside * (ratio if rounding else codes)).sum()) * share * scale.sign()
        shift = (inside.sum() - upstream.sum()) * (grid.scale * share)
        return inside.to(grad.dtype), slope.reshape(1), shift.reshape(1), None, None


def learned_fake_quantize_activation(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, rounding: bool = True
) -> Tensor:
    """Affine fake-quantization with a learned scale and zero point.

    Args:
        x: floating, any shape.
        scale: `(1,)`, a parameter; its magnitude counts.
        zero_point: `(1,)`, a parameter or not; rounded, so that zero is on the grid.
        bits: 2 to 8.
        rounding: True learns from the rounding error inside the range too (LSQ); False from clipped values only (PACT).

    References:
        Esser et al., "Learned Step Size Quantization", 2020, equation 3. Bhalgat et al., "LSQ+", 2020, equation 4: the
        offset; ours is a whole number of steps. Choi et al., "PACT", 2018, equation 3: its clipping level is
        `scale * top`.
    """
    result: Tensor = _LearnedActivation.apply(x, scale, zero_point, learned_grid(scale, zero_point, bits), rounding)
    return result


def learned_grid(scale: Tensor, zero_point: Tensor, bits: int) -> Grid:
    """The grid of a learned scale and zero point `(1,)`."""
    with torch.no_grad():
        positive = scale.float().abs().clamp_min(_TINY)
        return make_grid(positive.squeeze(0), zero_point.float().round().clamp(0, 2**bits - 1).squeeze(0), bits)


# -- integer products ------------------------------------------------------------------------------------------------


def dynamic_grid(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `(rows, 1)` of each row of float32 `(rows, values)`, over its own range."""
    scale, zero_point = affine_scale(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), bits)
    return scale, zero_point


def signed_codes(x: Tensor, inverse: Scalar, zero_point: Scalar, top: int) -> Tensor:
    """int8 codes of a float tensor: those of `affine_codes` less 128."""
    return affine_codes(x, inverse, zero_point, top).sub_(128).to(torch.int8)


def int_product(codes: Tensor, weight_codes: Tensor) -> Tensor:
    """int8 `(rows, in)` times int8 `(out, in)` transposed, accumulated in integers: `(rows, out)` as float32.

    Sums of more products than int32 holds (`INT32_PRODUCTS`) are computed in parts, and added in int64.
    """
    if codes.shape[1] <= INT32_PRODUCTS:
        return int_mm(codes, weight_codes.t()).float()
    total = torch.zeros(len(codes), len(weight_codes), dtype=torch.int64, device=codes.device)
    for part, weight_part in zip(codes.split(_PART, 1), weight_codes.split(_PART, 1), strict=True):
        total += int_mm(part.contiguous(), weight_part.contiguous().t())
    return total.float()
