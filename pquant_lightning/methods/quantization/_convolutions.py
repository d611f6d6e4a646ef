"""Convolutions of 8-bit codes by oneDNN, exact on every processor; weights are repacked once, beside the codes."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pquant_lightning.core.affine import Grid, affine_codes, top_code
from pquant_lightning.methods.quantization._products import fits_pairs, say_two_parts, two_parts

HAS_CONV = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")  # x86

_PACKED: Any = WeakTensorKeyDictionary()  # codes -> the same codes as oneDNN wants them


class _Packed(NamedTuple):
    parts: list[Tensor]  # that add up to the codes
    zeros: Tensor  # zero points of the weights


class _Window(NamedTuple):
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def int_conv(x: Tensor, layer: Any, codes: Tensor, scale: Tensor, bias: Tensor, grid: Grid | None, bits: int) -> Tensor:
    """Convolution in integers; float32 in channels-last layout.

    Args:
        x: `(batch, channels, height, width)`, or without height.
        layer: stride, padding, dilation and groups.
        codes: int8 `(out, in/groups, kh, kw)`, or without kh.
        scale: float32 `(out,)`.
        bias: float32 `(out,)`.
        grid: of the inputs; None makes a symmetric one for each sample.
        bits: of the inputs.
    """
    flat = codes.dim() == 3
    config: Any = [list(layer.stride), padding_of(layer), list(layer.dilation)]
    if flat:
        x, codes = x.unsqueeze(2), codes.unsqueeze(2)
        config = [[[1, 0, 1][i], *config[i]] for i in range(3)]
    row_scale = None
    if grid is None:
        row_scale = (x.abs().amax((1, 2, 3), keepdim=True).float() / top_code(bits)).clamp_min(1e-30)
        grid = Grid(1.0, row_scale.reciprocal(), 128, 128 + top_code(bits))
    quantized = affine_codes(x, grid.inverse, grid.zero_point, grid.top).to(torch.uint8)
    quantized = quantized.contiguous(memory_format=torch.channels_last)
    convolve: Any = qconv2d if torch.compiler.is_compiling() else _qconv2d
    start = torch.zeros_like(bias) if row_scale is not None else bias
    y: Tensor = convolve(quantized, codes, scale, start, float(grid.scale), int(grid.zero_point), *config, layer.groups)
    if row_scale is not None:
        y = torch.addcmul(bias[:, None, None], y, row_scale)
    return y.squeeze(2) if flat else y


def padding_of(layer: Any) -> list[int]:
    """What a convolution adds at either end of each of its dimensions."""
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [0] * len(layer.kernel_size) if layer.padding == "valid" else list(layer.padding)


@cache
def convolution_saturates() -> bool:
    """Whether oneDNN adds pairs of inputs in 16 bits here, found on the largest codes."""
    codes, ones = torch.full((16, 16, 1, 1), 127, dtype=torch.int8), torch.ones(16)
    window = _Window([1, 1], [0, 0], [1, 1], 1)
    x = torch.full((1, 16, 2, 2), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    found = _convolve(x, _pack(codes, [codes], ones, window), ones, torch.zeros(16), 1.0, 0, window)
    return bool((found != 16 * 255 * 127).any())


def needs_parts(codes: Tensor) -> bool:
    """Whether a convolution `(out, in/groups, kh, kw)` is done in two parts here, each exact."""
    return convolution_saturates() and not fits_pairs(codes)


def _pack(codes: Tensor, parts: list[Tensor], scale: Tensor, window: _Window) -> _Packed:
    packed = [torch.ops.onednn.qconv_prepack(part.contiguous(), scale, 1.0, 0, *window, None) for part in parts]
    return _Packed(packed, torch.zeros(len(codes), dtype=torch.int32))


def _convolve(
    x: Tensor, packed: _Packed, scale: Tensor, bias: Tensor, x_scale: float, zero_point: int, window: _Window
) -> Tensor:
    end: Any = (*window, 1.0, 0, torch.float32, "none", [], None)
    convolve: Any = torch.ops.onednn.qconv2d_pointwise
    first, *others = packed.parts
    y: Tensor = convolve(x, x_scale, zero_point, first, scale, packed.zeros, bias, *end)
    for part in others:
        y += convolve(x, x_scale, zero_point, part, scale, packed.zeros, None, *end)
    return y


def _qconv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_scale: float,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    window = _Window(stride, padding, dilation, groups)
    owner = codes if codes._base is None else codes._base
    packed = _PACKED.get(owner)
    if packed is None:
        if halved := needs_parts(codes):
            say_two_parts()
        parts = list(two_parts(codes)) if halved else [codes]
        packed = _PACKED[owner] = _pack(codes, parts, scale, window)
    return _convolve(x, packed, scale, bias, x_scale, zero_point, window)


def forget(codes: Tensor) -> None:
    """Drops what was repacked from these codes: they are about to change."""
    _PACKED.pop(codes, None)


qconv2d = torch.library.custom_op("pquant::qconv2d", _qconv2d, mutates_args=())


@qconv2d.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_scale: float,
    zero_point: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    shape = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (codes.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    ]
    empty = x.new_empty((x.shape[0], codes.shape[0], *shape), dtype=torch.float32)
    return empty.contiguous(memory_format=torch.channels_last)
