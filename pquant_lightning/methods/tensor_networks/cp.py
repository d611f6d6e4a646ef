"""CP: a convolution as 1x1, depthwise, 1x1; a Linear whose tensorized weight is a sum of rank-one terms."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import Stage, weight_of
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.options import check_rank_or_share, one_of
from pquant_lightning.core.plan import LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.tensor_networks._convs import (
    depthwise,
    from_kernel,
    pointwise,
    to_kernel,
    why_no_kernel,
)
from pquant_lightning.methods.tensor_networks._cp_als import cp_als, cp_dense, cp_full_rank, khatri_rao
from pquant_lightning.methods.tensor_networks._layers import FactoredLayer, plain_weights
from pquant_lightning.methods.tensor_networks._sizes import matrix_modes

_ROWS = 2  # leading modes that make the rows of the matrix which is decomposed


class CPConv(FactoredLayer, kind="cp_conv"):
    """`Conv(in, out, k)` as 1x1 `Conv(in, g*R)`, depthwise `Conv(g*R, g*R, k)`, 1x1 `Conv(g*R, out)`, g groups."""

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        layer, rank = spec["layer"], spec["rank"]
        channels = layer["in_channels"] // layer["groups"], layer["out_channels"] // layer["groups"]
        last = pointwise(layer, rank, channels[1], layer["bias"])
        return [pointwise(layer, channels[0], rank), depthwise(layer, rank), last]

    def set_factors(self, factors: list[Tensor], bias: nn.Parameter | None) -> None:
        """Takes the factors of kernel, in and out, `(groups, n, R)` each."""
        kernel, inputs, outputs = factors
        self.set_weights([inputs.mT, kernel.mT, outputs], bias)

    def dense_weight(self) -> Tensor:
        layer, rank = self.spec["layer"], self.spec["rank"]
        inputs, kernel, outputs = self.weights()
        by_group = kernel.reshape(layer["groups"], rank, -1).mT, inputs.reshape(layer["groups"], rank, -1).mT
        dense = cp_dense([*by_group, outputs.reshape(layer["groups"], -1, rank)])  # (groups, k, in, out)
        return from_kernel(dense.permute(0, 3, 2, 1).unflatten(-1, layer["kernel_size"]), layer)

    def described(self) -> str:
        return f"CP {self.spec['rank']}"


class CPLinear(FactoredLayer, kind="cp_linear"):
    """`Linear(in, out)` whose weight, as a tensor over two modes of the output and two of the input, has R terms.

    The parts are ordinary layers: `Linear(in_2, R)`, a depthwise `Conv1d` over in_1, a depthwise `ConvTranspose1d` to
    out_1, `Linear(R, out_2)`. While all of them are torch's own, the forward is two products with their Khatri-Rao
    products, R * (in + out) multiply-accumulates per row.
    """

    bias: nn.Parameter | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = super().from_spec(spec, replaced)
        out_features = spec["layer"]["out_features"]
        layer.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if spec["layer"]["bias"] else None)
        return layer

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        rank, (out_1, out_2), (in_1, in_2) = spec["rank"], spec["row_modes"], spec["column_modes"]
        each = {"in_channels": rank, "out_channels": rank, "groups": rank, "bias": False}
        return [
            {"type": "Linear", "in_features": in_2, "out_features": rank, "bias": False},
            {"type": "Conv1d", **each, "kernel_size": in_1},
            {"type": "ConvTranspose1d", **each, "kernel_size": out_1},
            {"type": "Linear", "in_features": rank, "out_features": out_2, "bias": False},
        ]

    def set_factors(self, factors: list[Tensor], bias: nn.Parameter | None) -> None:
        """Takes the factors of out_1, out_2, in_1 and in_2, `(1, n, R)` each."""
        out_1, out_2, in_1, in_2 = factors
        self.set_weights([in_2.mT, in_1.mT, out_1.mT, out_2], bias)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The weight as `outputs @ inputs.T`: `(out, R)` and `(in, R)`."""
        in_2, in_1, out_1, out_2 = self.weights()
        out_features, in_features = self.spec["layer"]["out_features"], self.spec["layer"]["in_features"]
        outputs = khatri_rao([out_1.squeeze(1).T, out_2])[:out_features]
        return outputs, khatri_rao([in_1.squeeze(1).T, in_2.T])[:in_features]

    def dense_weight(self) -> Tensor:
        outputs, inputs = self.factors()
        return outputs @ inputs.T

    def forward(self, x: Tensor) -> Tensor:
        if plain_weights(self.parts) is not None:
            outputs, inputs = self.factors()
            return F.linear(F.linear(x, inputs.T), outputs, self.bias)
        (in_1, in_2), out_features = self.spec["column_modes"], self.spec["layer"]["out_features"]
        narrow, reduce, expand, widen = self.parts
        rows = x.reshape(-1, x.shape[-1])
        if (padding := in_1 * in_2 - x.shape[-1]) > 0:
            rows = F.pad(rows, (0, padding))
        terms = reduce(narrow(rows.reshape(-1, in_1, in_2)).transpose(1, 2))  # (rows, R, 1)
        out = widen(expand(terms).transpose(1, 2)).flatten(1)[:, :out_features]
        if self.bias is not None:
            out = out + self.bias
        return out.reshape(*x.shape[:-1], out_features)

    def described(self) -> str:
        return f"CP {self.spec['rank']}"


@CompressionMethodRegistry.register("cp")
class CPCompression(LayerMethod):
    """CP of Conv and ConvTranspose layers with a kernel, and of Linear layers, at the start of fit, by stable ALS.

    The sizes of a Linear are split into two balanced factors each (padded where they have none). Give at most one of
    `rank` and `param_ratio`; none means `rank=64`. Grouped convolutions are decomposed group by group.

    Args:
        rank: number of rank-one terms, per group, a count; at most as many as make the decomposition exact.
        param_ratio: share of each layer's weights that is kept at most, in (0, 1]; gives the rank per layer. A Linear
            gets no more terms than those with which it needs as many multiply-accumulates as before.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: both rank and param_ratio, or a value out of range.

    References:
        Lebedev et al., "Speeding-up convolutional neural networks using fine-tuned CP-decomposition", 2014; we merge
        the kernel's modes, so that one depthwise convolution takes the place of two, and the error is smaller.

    >>> CPCompression(rank=6).plan(nn.Sequential(nn.Conv2d(16, 32, 3))).layers[0].spec["rank"]
    6
    """

    rank: int | None = None
    param_ratio: float | None = None

    stage = Stage.FACTORIZE

    def validate_config(self) -> None:
        super().validate_config()
        check_rank_or_share(type(self), *self._target())

    def _target(self) -> tuple[str, Any]:
        return one_of(type(self), {"rank": 64}, rank=self.rank, param_ratio=self.param_ratio)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> LayerPlan | Skip:
        if not isinstance(layer, nn.Linear) and (reason := why_no_kernel(layer)) is not None:
            return Skip(name, reason)
        spec: dict[str, Any] = {"kind": CPConv.kind}
        if isinstance(layer, nn.Linear):
            row_modes, column_modes = matrix_modes(weight_of(layer).shape, 2)
            if min(weight_of(layer).shape) == 1:
                return Skip(name, "has a side of length 1: it is a vector")
            spec = {"kind": CPLinear.kind, "row_modes": list(row_modes), "column_modes": list(column_modes)}
        tensor = cp_tensor(layer, spec)
        groups, *modes = tensor.shape
        target, value = self._target()
        rank = value
        if target == "param_ratio":
            rank = int(value * weight_of(layer).numel() / (groups * sum(modes)))
            if isinstance(layer, nn.Linear):
                rank = min(rank, max(1, weight_of(layer).numel() // sum(weight_of(layer).shape)))
        if rank < 1:
            return Skip(name, f"even rank 1 keeps more than {value:.0%} of its weights")
        return LayerPlan(name, {**spec, "rank": min(rank, cp_full_rank(modes, _ROWS))})

    def fill(self, new: CPConv | CPLinear, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        new.set_factors(cp_als(cp_tensor(old, plan.spec), plan.spec["rank"], _ROWS), getattr(old, "bias", None))


def cp_tensor(layer: nn.Module, spec: dict[str, Any]) -> Tensor:
    """The weight as the tensor that is decomposed: `(groups, k, in, out)`, or `(1, out_1, out_2, in_1, in_2)`."""
    weight = weight_of(layer).detach().float()
    if "row_modes" not in spec:
        return to_kernel(weight, layer_spec(layer)).flatten(3).permute(0, 3, 2, 1)
    rows, columns = spec["row_modes"], spec["column_modes"]
    missing = math.prod(columns) - weight.shape[1], math.prod(rows) - weight.shape[0]
    return F.pad(weight, (0, missing[0], 0, missing[1])).reshape(1, *rows, *columns)
