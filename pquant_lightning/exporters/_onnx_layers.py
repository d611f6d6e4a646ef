"""Twins of integer layers that onnxruntime has kernels for.

Traced, they give its operations (`written`). Run in PyTorch, they give what these operations are to compute
(`expected`), from the values of the layer that they stand for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.affine import dequantize
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.methods.low_rank.lora import adapters
from pquant_lightning.methods.quantization._convolutions import padding_of
from pquant_lightning.methods.quantization._integer import (
    IntConv1d,
    IntConv2d,
    IntConv3d,
    IntConvTranspose1d,
    IntConvTranspose2d,
    IntConvTranspose3d,
    IntLinear,
)

_CONVS = (IntConv1d, IntConv2d, IntConv3d, IntConvTranspose1d, IntConvTranspose2d, IntConvTranspose3d)
_DOMAIN = "com.microsoft"
_LEAST_CHANNELS, _LEAST_TERMS = 24, 64  # of a sum, from which on a product of patches is faster than a convolution
_LARGEST_PAIR = 32767 // 255  # of weights of one sign, beside inputs of 255
_LEAST_BLOCK, _LARGEST_BLOCK, _LEAST_BLOCK_OF_2_BITS = 16, 128, 32  # of MatMulNBits, powers of two


@dataclass(frozen=True)
class OnnxForm:
    """The choices of an ONNX file.

    Attributes:
        target: "any" multiplies bytes so that no processor saturates; "vnni" as is fastest on those with VNNI.
        accuracy_level: of MatMulNBits. 4 rounds inputs to 8 bits by blocks; 0 leaves them, which is slow.
    """

    target: str = "any"
    accuracy_level: int = 4


def with_onnx_layers(model: nn.Module, form: OnnxForm) -> nn.Module:
    """A copy that shares all tensors, with twins of the linear layers that onnxruntime computes in integers."""
    twin = share_copy(model)
    adapted = tuple(f"{name}." for name in adapters(twin))  # whose convolutions they run themselves
    for name, layer in compressed_layers(twin).items():
        if isinstance(layer, IntLinear):
            made = _twin_of(layer, form)
        else:
            made = None if name.startswith(adapted) else _conv_twin_of(layer, form)
        if made is not None:
            replace_layer(twin, name, made)
    return twin


def _twin_of(layer: IntLinear, form: OnnxForm) -> nn.Module | None:
    spec = layer.spec
    if layer.like.dtype is not torch.float32:
        return None
    if spec["bits"] == 8 and spec["act_bits"] == 8 and layer.zero is None and layer.scale.shape[1] == 1:
        return StaticLinear(layer, form) if spec["act"] == "static" else DynamicLinear(layer, form)
    return PackedLinear(layer, form) if spec["act"] is None and stored_bits(layer, form) else None


def stored_bits(layer: nn.Module, form: OnnxForm) -> int | None:
    """Bits in MatMulNBits, of a layer that becomes one: the next width for which there is a fast kernel.

    Without rounded inputs there are fast kernels for 4 bits alone.
    """
    if not isinstance(layer, IntLinear) or layer.spec["act"] is not None or layer.like.dtype is not torch.float32:
        return None
    if (block := _block(layer)) is None:
        return None
    bits = layer.spec["bits"]
    if form.accuracy_level == 0:
        return bits if bits == 4 else None
    if bits == 2 and block >= _LEAST_BLOCK_OF_2_BITS:
        return 2
    return 4 if bits <= 4 else 8


def _conv_twin_of(layer: nn.Module, form: OnnxForm) -> nn.Module | None:
    if not isinstance(layer, _CONVS) or layer.like.dtype is not torch.float32 or layer.spec["act_bits"] != 8:
        return None
    spec = layer.spec
    of_bytes = spec["bits"] == 8 and spec["kernel"] == "integer"
    if of_bytes and spec["act"] == "static":
        return QuantizedConv(layer, form) if spec["output_range"] else None
    by_product = of_bytes and layer.groups == 1 and layer.in_channels >= _LEAST_CHANNELS
    return (
        DynamicConv(layer, form) if by_product and layer.shape[1:].numel() >= _LEAST_TERMS else FloatConv(layer, form)
    )


def _block(layer: IntLinear) -> int | None:
    """Values per scale in MatMulNBits, a power of two; None where the groups of the layer do not go into it."""
    size = layer.spec["group_size"] or layer.in_features
    block = min(size & -size, _LARGEST_BLOCK)
    return block if block >= _LEAST_BLOCK and layer.in_features % size == 0 else None


def fits_anywhere(codes: Tensor) -> bool:
    """Whether no two products of these codes with inputs of up to 255 exceed 16 bits together, whichever two are added.

    Processors without VNNI add products of unsigned and signed bytes in pairs, and how onnxruntime pairs them up
    depends on the kernel and its layout.

    Args:
        codes: int8 `(out, terms)`.

    >>> [fits_anywhere(torch.tensor([row], dtype=torch.int8)) for row in ([127, 1, -99], [64, 0, 65], [-64, 5, -64])]
    [True, False, True]
    """
    if codes.shape[1] < 2:
        return True
    levels = codes.short()
    high, low = (ends.clamp_min(0).sum(1).amax() for ends in (levels.topk(2).values, levels.neg().topk(2).values))
    return max(int(high), int(low)) <= _LARGEST_PAIR


def _multiplied(codes: Tensor, form: OnnxForm) -> tuple[Tensor, Tensor | None]:
    """Codes `(out, ...)` as they are multiplied by unsigned bytes, and their zero point.

    Unsigned ones never saturate, but take a quarter longer than signed ones on a processor without VNNI.
    """
    if form.target == "vnni" or fits_anywhere(codes.flatten(1)):
        return codes, None
    return (codes.short() + 128).to(torch.uint8), torch.tensor(128, dtype=torch.uint8)


def _operation(name: str, x: Tensor, *rest: Tensor | None, out: int, **attributes: int) -> Tensor:
    """An operation of onnxruntime that gives float32 `(..., out)`."""
    shape, given = (*x.shape[:-1], out), dict[str, Any](attributes)
    return torch.onnx.ops.symbolic(f"{_DOMAIN}::{name}", (x, *rest), given, dtype=torch.float32, shape=shape, version=1)


class _Twin(nn.Module):
    """Stands for an integer layer, and has all of its attributes: a model's forward may read them."""

    def __init__(self, layer: Any, form: OnnxForm) -> None:
        super().__init__()
        self.hold(layer, form)
        self.layer = layer  # last, as from here on its attributes are found, too

    def hold(self, layer: Any, form: OnnxForm) -> None:
        """Takes over what is written."""
        raise NotImplementedError

    def written(self, x: Tensor, *args: Any) -> Tensor:
        """The output as operations of the file."""
        raise NotImplementedError

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        """The output as the file is to have it, where its grids are not those of the layer."""
        result: Tensor = self.layer(x, *args)
        return result

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.written(x, *args) if torch.compiler.is_exporting() or not x.numel() else self.expected(x, *args)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


class DynamicLinear(_Twin):
    """8-bit weights with a scale for each output; inputs on a grid that is found for the whole tensor as it runs."""

    codes: Tensor
    zero: Tensor | None
    scale: Tensor

    def hold(self, layer: IntLinear, form: OnnxForm) -> None:
        codes, zero = _multiplied(layer.codes, form)
        self.register_buffer("codes", codes.t().contiguous())  # (in, out)
        self.register_buffer("zero", zero)
        self.register_buffer("scale", layer.scale.squeeze(1))
        self.register_buffer("bias", layer.bias)
        self.out = layer.out_features

    def written(self, x: Tensor, *args: Any) -> Tensor:
        return _operation("DynamicQuantizeMatMul", x, self.codes, self.scale, self.zero, self.bias, out=self.out)

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        return _computed(self.layer, _whole_grid(x))


class StaticLinear(DynamicLinear):
    """The same with inputs on a calibrated grid."""

    act_scale: Tensor
    act_zero: Tensor

    def hold(self, layer: IntLinear, form: OnnxForm) -> None:
        super().hold(layer, form)
        scale, zero = layer.act_grid
        self.register_buffer("act_scale", scale.clone())
        self.register_buffer("act_zero", zero.to(torch.uint8))

    def written(self, x: Tensor, *args: Any) -> Tensor:
        quantize: Callable[..., Any] = torch.onnx.ops.symbolic
        grid = (self.act_scale, self.act_zero)
        codes = quantize("::QuantizeLinear", (x, *grid), {}, dtype=torch.uint8, shape=x.shape, version=18)
        weights = (self.codes, self.act_scale, self.scale, self.act_zero, self.zero, self.bias)
        return _operation("MatMulIntegerToFloat", codes, *weights, out=self.out)

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        return _Twin.expected(self, x, *args)


class PackedLinear(_Twin):
    """Weights of 2 to 8 bits with a scale, and a zero point, for each block of inputs.

    Zero points are integers there. What a fractional one leaves is a term of the sums of the inputs over the blocks.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    rest: Tensor | None

    def hold(self, layer: IntLinear, form: OnnxForm) -> None:
        outputs, inputs = layer.shape
        bits, block = stored_bits(layer, form), _block(layer)
        assert bits is not None
        assert block is not None
        self.bits, self.block, self.level = bits, block, form.accuracy_level
        self.rounds_inputs = form.accuracy_level == 4
        count = inputs // block
        per_group = count // layer.scale.shape[1]
        middle = 2 ** (bits - 1)
        levels = (layer.weight_codes().to(torch.int16) + middle).to(torch.uint8)
        self.register_buffer("codes", _packed(levels, bits).reshape(outputs, count, block * bits // 8))
        self.register_buffer("scale", layer.scale.repeat_interleave(per_group, 1).contiguous())
        zero, left = None, None
        if layer.zero is not None:
            exact = (layer.zero.float() + middle).repeat_interleave(per_group, 1)
            near = exact.round().clamp(0, 2 * middle - 1)
            zero = _packed(near.to(torch.uint8), bits)
            left = None if torch.equal(near, exact) else ((near - exact) * self.scale).t().contiguous()
        self.register_buffer("zero", zero)
        self.register_buffer("rest", left)  # (blocks, out)
        self.register_buffer("bias", layer.bias)
        self.inputs, self.out = inputs, outputs

    def written(self, x: Tensor, *args: Any) -> Tensor:
        sizes = {"K": self.inputs, "N": self.out, "bits": self.bits, "block_size": self.block}
        sizes |= {"accuracy_level": self.level} if self.level else {}
        y = _operation("MatMulNBits", x, self.codes, self.scale, self.zero, None, self.bias, out=self.out, **sizes)
        return y if self.rest is None else y + x.unflatten(-1, (-1, self.block)).sum(-1) @ self.rest

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        if not self.rounds_inputs:
            return super().expected(x)
        values = x.unflatten(-1, (-1, self.block))
        step = (values.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return _computed(self.layer, ((values / step).round() * step).flatten(-2))


def _packed(levels: Tensor, bits: int) -> Tensor:
    """uint8 values of 2, 4 or 8 bits, `(rows, n)`, packed into `(rows, ceil(n bits / 8))` bytes, the first lowest."""
    each = 8 // bits
    levels = nn.functional.pad(levels, (0, -levels.shape[1] % each))
    packed = torch.zeros_like(levels[:, ::each])
    for place in range(each):
        packed |= levels[:, place::each] << (bits * place)
    return packed.contiguous()


class QuantizedConv(_Twin):
    """A convolution between grids of its input and its output, which onnxruntime fuses to QLinearConv.

    Attributes:
        rounds_output: whether the graph still has the rounding of its output.
    """

    rounds_output: bool

    def hold(self, layer: Any, form: OnnxForm) -> None:
        self.rounds_output = True
        codes, offset = _multiplied(layer.codes, form)
        scale, zero = layer.act_grid
        both = layer.scale.squeeze(1) * scale
        bias = torch.zeros_like(both) if layer.bias is None else layer.bias.float()
        low, high = layer.output_range.tolist()
        low, high = min(low, 0.0), max(high, 0.0)
        step = max(high - low, 1e-8) / 255
        for name, tensor in {
            "codes": codes,
            "offset": None if offset is None else offset.expand(len(codes)).clone(),
            "scale": layer.scale.squeeze(1).clone(),
            "bias": (bias / both).round().to(torch.int32),
            "bias_scale": both,
            "act_scale": scale.clone(),
            "act_zero": zero.to(torch.uint8),
            "out_scale": torch.tensor(step, dtype=torch.float32),
            "out_zero": torch.tensor(round(-low / step), dtype=torch.uint8),
        }.items():
            self.register_buffer(name, tensor)

    def written(self, x: Tensor, *args: Any) -> Tensor:
        x = _on_grid(x, self.act_scale, self.act_zero)
        weight = _dequantized(self.codes, self.scale, self.offset, axis=0)
        y = self.layer.compute(x, weight, _dequantized(self.bias, self.bias_scale, None, axis=0))
        return _on_grid(y, self.out_scale, self.out_zero)


class FloatConv(_Twin):
    """A convolution in floating point, of 8-bit weights: to round its inputs would only cost time."""

    rounds_inputs = False

    def hold(self, layer: Any, form: OnnxForm) -> None:
        """Nothing: onnxruntime multiplies the layer's codes by their scales when it loads the file."""

    def written(self, x: Tensor, *args: Any) -> Tensor:
        return self.layer.compute(x, self.layer.dense_weight(), self.layer.bias, *args)

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        return _computed(self.layer, x, *args)


class DynamicConv(_Twin):
    """A convolution as a product of matrices; inputs on a grid that is found for the whole tensor as it runs.

    onnxruntime's own operation for it, ConvInteger, takes longer than a convolution in floating point.
    """

    codes: Tensor
    zero: Tensor | None
    scale: Tensor

    def hold(self, layer: Any, form: OnnxForm) -> None:
        codes, zero = _multiplied(layer.codes, form)
        self.register_buffer("codes", codes.movedim(1, -1).flatten(1).t().contiguous())  # (kernel * in, out)
        self.register_buffer("zero", zero)
        self.register_buffer("scale", layer.scale.squeeze(1))
        self.register_buffer("bias", layer.bias)
        self.out = layer.out_channels
        self.padding = padding_of(layer)
        self.windows = list(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True))

    def written(self, x: Tensor, *args: Any) -> Tensor:
        if x.dim() == len(self.windows) + 1:
            return self.written(x[None])[0]
        symbolic: Any = torch.onnx.ops.symbolic_multi_out
        kinds, shapes = (torch.uint8, torch.float32, torch.uint8), (x.shape, (), ())
        codes, scale, zero = symbolic("::DynamicQuantizeLinear", (x,), {}, dtypes=kinds, shapes=shapes, version=11)
        if any(self.padding):
            codes = self._padded(codes, zero)
        places, sizes = self._patches(codes.shape[2:])
        rows = codes.flatten(2).transpose(1, 2)  # (samples, positions, in)
        if any(window[:2] != (1, 1) for window in self.windows):
            rows = rows.index_select(1, places)
        rows = rows.reshape(x.shape[0], -1, self.codes.shape[0])  # (samples, windows, kernel * in)
        factors = (self.codes, scale, self.scale, zero, self.zero, self.bias)
        y = _operation("MatMulIntegerToFloat", rows, *factors, out=self.out)
        return y.transpose(1, 2).unflatten(2, sizes)

    def expected(self, x: Tensor, *args: Any) -> Tensor:
        return _computed(self.layer, _whole_grid(x))

    def _padded(self, codes: Tensor, zero: Tensor) -> Tensor:
        symbolic: Any = torch.onnx.ops.symbolic
        ends = torch.tensor([0, 0, *self.padding] * 2)
        shape = (*codes.shape[:2], *(size + 2 * pad for size, pad in zip(codes.shape[2:], self.padding, strict=True)))
        return symbolic("::Pad", (codes, ends, zero), {"mode": "constant"}, dtype=torch.uint8, shape=shape, version=18)

    def _patches(self, sizes: Any) -> tuple[Tensor, list[Any]]:
        """Where the values of each window lie in an image that is flat, and how many windows there are each way."""
        starts, offsets, counts = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), []
        for size, (kernel, stride, dilation) in zip(sizes, self.windows, strict=True):
            count = (size - dilation * (kernel - 1) - 1) // stride + 1
            starts = (starts[:, None] * size + torch.arange(count) * stride).flatten()
            offsets = (offsets[:, None] * size + torch.arange(kernel) * dilation).flatten()
            counts.append(count)
        return (starts[:, None] + offsets).flatten(), counts


def _whole_grid(x: Tensor) -> Tensor:
    """Inputs as DynamicQuantizeLinear rounds them: on one grid of 8 bits for all of them, which holds zero."""
    low, high = x.min().clamp_max(0.0), x.max().clamp_min(0.0)
    scale = ((high - low) / 255).clamp_min(1e-30)
    zero = (-low / scale).round()
    return ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale


def _computed(layer: Any, x: Tensor, *args: Any) -> Tensor:
    """A layer's weights and bias beside given inputs, in float64."""
    weight = dequantize(layer.weight_codes().double(), layer.scale.double(), layer.axis, layer.zero)
    bias = None if layer.bias is None else layer.bias.double()
    result: Tensor = layer.compute(x.double(), weight, bias, *args).to(x.dtype)
    return result


def _on_grid(x: Tensor, scale: Any, zero: Any) -> Tensor:
    codes = torch.onnx.ops.symbolic(
        "::QuantizeLinear", (x, scale, zero), {}, dtype=torch.uint8, shape=x.shape, version=18
    )
    return _dequantized(codes, scale, zero)


def _dequantized(codes: Any, scale: Any, zero: Any, **attributes: int) -> Tensor:
    inputs = (codes, scale) if zero is None else (codes, scale, zero)
    given = dict[str, Any](attributes)
    return torch.onnx.ops.symbolic(
        "::DequantizeLinear", inputs, given, dtype=torch.float32, shape=codes.shape, version=18
    )
