"""Products of 8-bit codes, computed in integers with the kernels that torch ships.

Linear layers use `torch._int_mm` (CPU and CUDA); convolutions oneDNN's quantized convolution (CPU), whose repacked
weights are cached beside the codes, not in the layer. Where no kernel applies a layer dequantizes; `why_no_kernel` says
so before anything is changed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from pquant_lightning.core.affine import Grid, affine_codes, dynamic_grid, int_product, signed_codes, top_code

HAS_CONV = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")  # x86

CONV_PRODUCTS = (2**31 - 1) // (255 * 127)  # that int32 holds the sum of, of an unsigned input code and a weight code

_PACKED: Any = WeakTensorKeyDictionary()  # codes -> the same codes as oneDNN wants them


def why_no_kernel(layer: nn.Module, act_bits: int, group_size: int | None) -> str | None:
    """Why an ordinary layer cannot compute in integers; None where it can."""
    if isinstance(layer, nn.Embedding):
        return "a lookup computes nothing"
    if act_bits == 16:
        return "inputs are not quantized"
    if group_size is not None:
        return "weights have a scale per group"
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv1d | nn.Conv2d):
        return f"torch has no integer kernel for {type(layer).__name__}"
    if (products := layer.weight[0].numel()) > CONV_PRODUCTS:
        return f"a sum of {products:,} products does not fit into 32 bits"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if layer.padding == "same" and any(d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)):
        return "padding='same' with an even kernel pads one side more"
    return None if HAS_CONV else "this build of torch has no oneDNN"


def linear_runs_here(codes: Tensor) -> bool:
    """Whether `torch._int_mm` takes these codes on their device: CUDA asks for multiples of 8."""
    return codes.device.type == "cpu" or (codes.is_cuda and codes.shape[0] % 8 == 0 and codes.shape[1] % 8 == 0)


# -- linear ----------------------------------------------------------------------------------------------------------


def static_linear(x: Tensor, codes: Tensor, grid: Grid, multiplier: Tensor, offset: Tensor) -> Tensor:
    """Linear layer on a static grid.

    Args:
        x: `(..., in)`.
        codes: int8 `(out, in)`.
        grid: of the inputs.
        multiplier: float32 `(out,)`: scale of the inputs times scale of the weights.
        offset: float32 `(out,)`: the bias, with what the zero point adds taken out.

    Returns:
        float32 `(..., out)`.
    """
    rows = signed_codes(x.reshape(-1, x.shape[-1]), grid.inverse, grid.zero_point, grid.top)
    return torch.addcmul(offset, _product(rows, codes), multiplier).reshape(*x.shape[:-1], -1)


def dynamic_linear(x: Tensor, codes: Tensor, bits: int, scale: Tensor, sums: Tensor, bias: Tensor) -> Tensor:
    """Linear layer with a grid for each row of its input; `sums` float32 `(out,)` are the sums of each row of codes."""
    rows = x.reshape(-1, x.shape[-1]).float()
    row_scale, zero_point = dynamic_grid(rows, bits)
    quantized = signed_codes(rows, row_scale.reciprocal(), zero_point, 2**bits - 1)
    product = _product(quantized, codes).addr_(128 - zero_point.squeeze(1), sums)
    return torch.addcmul(bias, product.mul_(row_scale), scale).reshape(*x.shape[:-1], -1)


def _product(rows: Tensor, codes: Tensor) -> Tensor:
    if not rows.is_cuda or rows.shape[0] > 16:
        return int_product(rows, codes)
    return int_product(F.pad(rows, (0, 0, 0, 17 - rows.shape[0])), codes)[: rows.shape[0]]


# -- convolution -----------------------------------------------------------------------------------------------------


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
    padding = padding_of(layer)
    config: Any = [list(layer.stride), padding, list(layer.dilation)]
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
    owner = codes if codes._base is None else codes._base
    packed = _PACKED.get(owner)
    if packed is None:
        packed = torch.ops.onednn.qconv_prepack(codes, scale, 1.0, 0, stride, padding, dilation, groups, None)
        packed = _PACKED[owner] = packed, torch.zeros(len(codes), dtype=torch.int32)
    args: Any = (stride, padding, dilation, groups, 1.0, 0, torch.float32, "none", [], None)
    return torch.ops.onednn.qconv2d_pointwise(x, x_scale, zero_point, packed[0], scale, packed[1], bias, *args)


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
