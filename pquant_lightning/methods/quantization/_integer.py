"""The deployed form of quantized layers: integer codes with their scales; nothing trains.

A layer computes in integers where its spec says `kernel: integer`, and otherwise multiplies the codes by their scales
first. Where a gradient is asked for, or a program is exported, it also takes the second way, which is plain torch.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core._private import quantized_decomposed
from pquant_lightning.core.affine import (
    Grid,
    affine_codes,
    dequantize,
    dynamic_grid,
    fake_quantize_activation,
    make_grid,
    pack,
    packed_bytes,
    top_code,
    unblock,
    unpack,
)
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage
from pquant_lightning.core.errors import ModelError
from pquant_lightning.methods.quantization import _convolutions, _products
from pquant_lightning.methods.quantization._forms import (
    Conv1dForm,
    Conv2dForm,
    Conv3dForm,
    ConvTranspose1dForm,
    ConvTranspose2dForm,
    ConvTranspose3dForm,
    LinearForm,
    describe,
    layer_config,
)
from pquant_lightning.methods.quantization._kernels import choose, compute, convolution, traced_product

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class IntLayer(CompressedLayer, stage=Stage.QUANTIZE):
    """Base of the deployed form. Its spec has `bits`, `act_bits`, `act`, `group_size`, `kernel`, `zero_point`,
    `rounding`, `has_bias`, `output_range`, `dtype`.

    Attributes:
        codes: int8, the shape of the weight; below 8 bits packed: uint8 `(channels, bytes)` (see `affine.pack`).
        scale: float32 `(channels, groups)`.
        zero: float16 `(channels, groups)`, the code that stands for zero; None where the grid is symmetric.
        act_grid: float32 `(2,)`, scale and zero point of the inputs, where they are static.
        output_range: float32 `(2,)`, least and largest output in calibration, where it was measured.
        bias: `(out,)` or None.
        like: empty, not stored; its dtype is the dtype of the layer's output.
    """

    deployed = True
    axis: ClassVar[int]
    float32_tensors = ("scale", "zero", "act_grid", "output_range")
    parameter_buffers = ("codes", "bias")
    derived_tensors = ("codes", "scale", "zero")
    shape: torch.Size
    _ready: dict[str, Any] | None
    _grid: Grid | None
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    act_grid: Tensor
    output_range: Tensor
    like: Tensor

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = cls(**layer_config(spec))
        layer.shape = layer.weight.shape
        channels = layer.shape[cls.axis]
        count = layer.shape.numel() // channels
        del layer.weight
        bits, groups = spec["bits"], 1 if spec["group_size"] is None else count // spec["group_size"]
        codes = torch.empty(layer.shape, dtype=torch.int8)
        packed = None if bits == 8 else torch.empty(channels, packed_bytes(count, bits), dtype=torch.uint8)
        layer.register_buffer("codes", codes if packed is None else packed)
        layer.register_buffer("scale", torch.empty(channels, groups, dtype=torch.float32))
        layer.register_buffer(
            "zero", torch.empty(channels, groups, dtype=torch.float16) if spec["zero_point"] else None
        )
        if spec["act"] == "static":
            layer.register_buffer("act_grid", torch.empty(2, dtype=torch.float32))
            quantized_decomposed()  # exporters look for these operations before they run the model
        if spec["output_range"]:
            layer.register_buffer("output_range", torch.empty(2, dtype=torch.float32))
        layer.register_buffer("like", torch.empty(0, dtype=_DTYPES[spec["dtype"]], device="cpu"), persistent=False)
        if not isinstance(layer, nn.Embedding):
            del layer.bias
            layer.register_buffer("bias", torch.empty(channels) if spec["has_bias"] else None)
        layer._ready = layer._grid = None
        return layer

    def set_values(
        self, codes: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, grid: Grid | None
    ) -> None:
        """Takes over int8 codes of the weight's shape, scales, zero points, a bias, and the inputs' static grid."""
        bits = self.spec["bits"]
        self.codes = codes if bits == 8 else pack(codes.movedim(self.axis, 0).flatten(1), bits)
        self.scale = scale
        if zero is not None:
            self.zero = zero.half()
        if bias is not None:
            self.register_buffer("bias", bias.to(self.like.dtype))
        if grid is not None:
            self.act_grid = torch.stack(
                [torch.as_tensor(v, dtype=torch.float32, device=codes.device) for v in (grid.scale, grid.zero_point)]
            )
            self._read_grid()

    def weight_codes(self) -> Tensor:
        """int8 codes of the weight's shape."""
        if self.spec["bits"] == 8:
            return self.codes
        count = self.shape.numel() // self.shape[self.axis]
        return unblock(unpack(self.codes, count, self.spec["bits"]), self.shape, self.axis)

    def derivation(self) -> tuple[Any, ...]:
        return (self.axis, *(self.spec[key] for key in ("bits", "group_size", "zero_point", "rounding")))

    def count_in(self, name: str) -> int:
        return self.shape.numel() if name == "codes" else super().count_in(name)

    def dense_weight(self) -> Tensor:
        return dequantize(self.weight_codes(), self.scale, self.axis, self.zero).to(self.like.dtype)

    if TYPE_CHECKING:
        weight: Tensor
    else:

        @property
        def weight(self) -> Tensor:
            """The weight in floating point, computed; read-only."""
            return self.dense_weight()

    def described(self) -> str:
        return describe(self.spec)

    # -- what the kernels need, made once and kept outside of the state dict ------------------------------------------

    def ready(self) -> dict[str, Any]:
        """Unpacked codes, the grid as numbers, and constants of the products; dropped when anything changes."""
        if self._ready is None:
            with torch.no_grad():
                self._ready = self._prepare()
        return self._ready

    def _prepare(self) -> dict[str, Any]:
        codes = self.weight_codes()
        found: dict[str, Any] = {"codes": codes, "choices": {}, "weights": {}}
        if self._grid is not None:
            found["grid"] = self._grid
        if self.spec["kernel"] == "integer":
            weight_scale = self.scale.squeeze(1)
            bias = torch.zeros_like(weight_scale) if self.bias is None else self.bias.float()
            sums = codes.flatten(1).sum(1, dtype=torch.int32).float()
            found.update(scale=weight_scale, bias=bias, sums=sums)
            if "grid" in found:
                multiplier = weight_scale * found["grid"].scale
                found.update(multiplier=multiplier, offset=bias + multiplier * sums * (128 - found["grid"].zero_point))
        return found

    def _read_grid(self) -> None:
        """The grid as numbers, so that programs can be compiled and exported with them."""
        if self.spec["act"] == "static" and not self.act_grid.is_meta:
            scale, zero_point = self.act_grid.cpu()
            self._grid = make_grid(scale, zero_point, self.spec["act_bits"])

    def _forget(self) -> None:
        if self._ready is not None:
            for module in (_products, _convolutions):
                module.forget(self._ready["codes"])
            self._ready = None

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_grid()
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": None}

    # -- forward -----------------------------------------------------------------------------------------------------

    def plain(self, x: Tensor) -> bool:
        """Whether this call computes in plain torch: a program is exported, or a gradient is asked for."""
        if not x.is_floating_point():
            raise ModelError(
                f"A quantized {type(self).__name__} takes floating-point inputs, got {x.dtype}; convert them first "
                "(x.float())."
            )
        wants_gradient = x.requires_grad and torch.is_grad_enabled()
        return wants_gradient or x.numel() == 0 or x.is_meta or torch.compiler.is_exporting()

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on its grid, in floating point."""
        bits = self.spec["act_bits"]
        if self.spec["act"] is None:
            return x
        if self.spec["act"] == "dynamic":
            return self._dynamic_input(x, bits)
        if self.act_grid.is_meta:
            return x
        grid = self._grid
        assert grid is not None
        if not torch.compiler.is_exporting():
            return fake_quantize_activation(x, grid)
        if bits == 8:  # exporters know these two as QuantizeLinear and DequantizeLinear
            ops, options = quantized_decomposed(), (grid.scale, int(grid.zero_point), 0, 255, torch.uint8)
            return ops.dequantize_per_tensor(ops.quantize_per_tensor(x.float(), *options), *options).to(x.dtype)
        levels = affine_codes(x, grid.inverse, grid.zero_point, grid.top) - grid.zero_point
        return (levels * grid.scale).to(x.dtype)

    def _dynamic_input(self, x: Tensor, bits: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        scale, zero_point = dynamic_grid(rows, bits)
        levels = (rows * scale.reciprocal()).round().clamp(-zero_point, 2**bits - 1 - zero_point)
        return (levels * scale).reshape(x.shape).to(x.dtype)


class _Computing(IntLayer):
    compute: Any

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.plain(x):
            result: Tensor = self.compute(self.quantized_input(x), self.dense_weight(), self.bias, *args)
            return result
        if torch.compiler.is_compiling():
            return self.traced(x, *args).to(self.like.dtype)
        return compute(self, x, *args).to(self.like.dtype)

    def kernel_for(self, x: Tensor) -> str | None:
        return None if self.plain(x) else choose(self, x).kernel.name

    def traced(self, x: Tensor, *args: Any) -> Tensor:
        """The output in operations that can be compiled: in integers where the layer computes in them."""
        result: Tensor = self.compute(self.quantized_input(x), self.dense_weight(), self.bias, *args)
        return result


class _Convolving(_Computing):
    """Convolutions."""

    def traced(self, x: Tensor, *args: Any) -> Tensor:
        if self.spec["kernel"] != "integer" or x.device.type != "cpu" or x.dim() != len(self.shape):
            return super().traced(x, *args)
        return convolution(self, x)

    def _dynamic_input(self, x: Tensor, bits: int) -> Tensor:
        """Symmetric over each sample, since padding must stay zero."""
        top = top_code(bits)
        scale = (x.abs().flatten(1).amax(1).float() / top).clamp_min(1e-30)[(..., *[None] * (x.dim() - 1))]
        return ((x.float() * scale.reciprocal()).round().clamp(-top, top) * scale).to(x.dtype)


class IntLinear(_Computing, LinearForm, kind="int_linear"):
    """Linear with integer codes (out, in)."""

    def traced(self, x: Tensor, *args: Any) -> Tensor:
        return traced_product(self, x) if self.spec["kernel"] == "integer" else super().traced(x, *args)


class IntConv1d(_Convolving, Conv1dForm, kind="int_conv1d"):
    """Conv1d with integer codes (out, in/groups, k)."""


class IntConv2d(_Convolving, Conv2dForm, kind="int_conv2d"):
    """Conv2d with integer codes (out, in/groups, kh, kw)."""


class IntConv3d(_Convolving, Conv3dForm, kind="int_conv3d"):
    """Conv3d with integer codes (out, in/groups, kd, kh, kw); it dequantizes."""


class IntConvTranspose1d(_Convolving, ConvTranspose1dForm, kind="int_conv_transpose1d"):
    """ConvTranspose1d with integer codes (in, out/groups, k); it dequantizes."""


class IntConvTranspose2d(_Convolving, ConvTranspose2dForm, kind="int_conv_transpose2d"):
    """ConvTranspose2d with integer codes; it dequantizes."""


class IntConvTranspose3d(_Convolving, ConvTranspose3dForm, kind="int_conv_transpose3d"):
    """ConvTranspose3d with integer codes; it dequantizes."""


class IntEmbedding(IntLayer, nn.Embedding, kind="int_embedding"):
    """Embedding with integer codes (num, dim) and scales per row; only the rows looked up are dequantized."""

    axis = 0

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = F.embedding(x, self.codes), F.embedding(x, self.scale)
        if self.spec["bits"] < 8:
            rows = unpack(codes.flatten(0, -2), self.embedding_dim, self.spec["bits"])
            codes = rows.reshape(*x.shape, self.embedding_dim)
        levels = codes.float().unflatten(-1, (scale.shape[-1], self.embedding_dim // scale.shape[-1]))
        if self.zero is not None:
            levels = levels - F.embedding(x, self.zero).float()[..., None]
        return (levels * scale[..., None]).flatten(-2).to(self.like.dtype)
