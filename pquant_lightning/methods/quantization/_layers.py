"""Quantized layers: the training form (float master weight, fake-quantized) and the deployed form (int8 codes).

Both forms of a layer share one forward; they differ in where the weight comes from.
"""

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning.core.affine import (
    dequantize,
    fake_quantize_activation,
    fake_quantize_weight,
    symmetric_codes,
    symmetric_scale,
)
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage

RANGE_MOMENTUM = 0.01  # of the moving average of the inputs' minimum and maximum, as in torch's observers


class _Quantized(CompressedLayer, stage=Stage.QUANTIZE):
    """A layer with a quantized weight (per output channel, symmetric) and input (per tensor, affine).

    Attributes:
        act_range: float32 `(2,)`, moving minimum and maximum of the inputs; (inf, -inf) before the first batch.
    """

    act_range: Tensor
    weight: Tensor
    _observed: bool

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        config = {key: tuple(v) if isinstance(v, list) else v for key, v in spec["layer"].items() if key != "type"}
        layer = cls(**config)
        if spec["act_bits"] < 16:
            layer.register_buffer("act_range", torch.tensor([torch.inf, -torch.inf], dtype=torch.float32, device="cpu"))
        layer._observed = False
        return layer

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input on its grid; unchanged before any range is known (a sanity check before the first batch)."""
        bits = self.spec["act_bits"]
        if bits == 16:
            return x
        if self.training:
            self.observe(x)
        if not self._observed and not self._check_observed():
            return x
        return fake_quantize_activation(x, self.act_range[0], self.act_range[1], bits)

    def observe(self, x: Tensor) -> None:
        """Moves the range towards this batch's minimum and maximum over all processes."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if x.numel() == 0 and not distributed:
            return
        with torch.no_grad():
            low, high = torch.aminmax(x.detach()) if x.numel() else (x.new_tensor(torch.inf), x.new_tensor(-torch.inf))
            extremes = torch.stack([-low, high]).float()
            if distributed:
                torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
            extremes[0].neg_()
            if self._observed or self._check_observed():
                self.act_range.lerp_(extremes, RANGE_MOMENTUM)
            else:
                self.act_range.copy_(extremes)
                self._observed = True

    def _check_observed(self) -> bool:
        self._observed = not self.act_range.is_meta and bool(self.act_range[0] <= self.act_range[1])
        return self._observed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.spec["act_bits"] < 16:
            self._check_observed()

    def described(self) -> str:
        acts = f", {self.spec['act_bits']}-bit inputs" if self.spec["act_bits"] < 16 else ""
        return f"{self.spec['bits']}-bit weights{acts}"


class _FakeQuantized(_Quantized):
    """Training form: the float weight under its own name, rounded in every forward."""

    float32_buffers = ("act_range",)
    deployed_kind: ClassVar[str]

    def dense_weight(self) -> Tensor:
        bits = self.spec["bits"]
        return self.weight if bits == 16 else fake_quantize_weight(self.weight, bits)

    def finalized(self) -> nn.Module:
        if self.spec["bits"] == 16:
            return self
        final = CompressedLayer.build({**self.spec, "kind": self.deployed_kind}, self)
        assert isinstance(final, _Integer)
        with torch.no_grad():
            final.set_codes(self.weight)
            if self.spec["act_bits"] < 16:
                final.act_range = self.act_range.clone()
                final._observed = self._observed
            bias = getattr(self, "bias", None)
            if bias is not None:
                final.bias = bias.detach().clone()
        return final


class _Integer(_Quantized):
    """Deployed form: int8 codes with a float32 scale per output channel; nothing trains.

    Attributes:
        codes: int8, the shape of the weight.
        scale: float32 `(out,)`.
        like: empty, not stored; its dtype is the dtype of the layer's output.
    """

    deployed = True
    float32_buffers = ("act_range", "scale")
    parameter_buffers = ("codes", "bias")
    derived_tensors = ("codes", "scale")
    codes: Tensor
    scale: Tensor
    like: Tensor

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = super().from_spec(spec, replaced)
        shape, bias = layer.weight.shape, getattr(layer, "bias", None)
        del layer.weight
        layer.register_buffer("codes", torch.empty(shape, dtype=torch.int8))
        layer.register_buffer("scale", torch.empty(shape[0], dtype=torch.float32))
        layer.register_buffer("like", torch.empty(0), persistent=False)
        if bias is not None:
            del layer.bias
            layer.register_buffer("bias", torch.empty_like(bias, requires_grad=False))
        return layer

    def set_codes(self, weight: Tensor) -> None:
        """Rounds a float weight to codes and scales."""
        self.scale = symmetric_scale(weight, self.spec["bits"])
        self.codes = symmetric_codes(weight, self.scale)

    def dense_weight(self) -> Tensor:
        return dequantize(self.codes, self.scale, self.like.dtype)


class _Linear(_Quantized, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantized_input(x), self.dense_weight(), self.bias)


class _Conv1d(_Quantized, nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.dense_weight(), self.bias)


class _Conv2d(_Quantized, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.dense_weight(), self.bias)


class _Conv3d(_Quantized, nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.dense_weight(), self.bias)


class QATLinear(_FakeQuantized, _Linear, kind="qat_linear"):
    """Linear in training form; `weight` (out, in) is the float master weight."""

    deployed_kind = "int_linear"


class QATConv1d(_FakeQuantized, _Conv1d, kind="qat_conv1d"):
    """Conv1d in training form."""

    deployed_kind = "int_conv1d"


class QATConv2d(_FakeQuantized, _Conv2d, kind="qat_conv2d"):
    """Conv2d in training form."""

    deployed_kind = "int_conv2d"


class QATConv3d(_FakeQuantized, _Conv3d, kind="qat_conv3d"):
    """Conv3d in training form."""

    deployed_kind = "int_conv3d"


class QATEmbedding(_FakeQuantized, nn.Embedding, kind="qat_embedding"):
    """Embedding in training form: only the rows looked up are rounded, each on its own scale; indices stay indices."""

    deployed_kind = "int_embedding"

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x)
        return fake_quantize_weight(rows.reshape(-1, self.embedding_dim), self.spec["bits"]).view_as(rows)


class IntLinear(_Integer, _Linear, kind="int_linear"):
    """Linear with int8 codes (out, in), dequantized in the forward."""


class IntConv1d(_Integer, _Conv1d, kind="int_conv1d"):
    """Conv1d with int8 codes (out, in/groups, k), dequantized in the forward."""


class IntConv2d(_Integer, _Conv2d, kind="int_conv2d"):
    """Conv2d with int8 codes (out, in/groups, kh, kw), dequantized in the forward."""


class IntConv3d(_Integer, _Conv3d, kind="int_conv3d"):
    """Conv3d with int8 codes (out, in/groups, kd, kh, kw), dequantized in the forward."""


class IntEmbedding(_Integer, nn.Embedding, kind="int_embedding"):
    """Embedding with int8 codes (num, dim) and a scale per row; only the rows looked up are dequantized."""

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = F.embedding(x, self.codes), F.embedding(x, self.scale.unsqueeze(-1))
        return (rows.float() * scales).to(self.like.dtype)


TRAINING_KINDS: dict[type[nn.Module], type[_FakeQuantized]] = {
    nn.Linear: QATLinear,
    nn.Conv1d: QATConv1d,
    nn.Conv2d: QATConv2d,
    nn.Conv3d: QATConv3d,
    nn.Embedding: QATEmbedding,
}
