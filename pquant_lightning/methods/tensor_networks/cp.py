"""CP: a convolution as 1x1, depthwise, 1x1; a Linear whose tensorized weight is a sum of rank-one terms."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.moments import InputMoments
from pquant_lightning.core.options import check_rank_or_share, one_of
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.tensor_networks._base import TensorNetworkMethod, output_moment
from pquant_lightning.methods.tensor_networks._convs import (
    depthwise,
    from_kernel,
    pointwise,
    to_kernel,
    why_no_kernel,
)
from pquant_lightning.methods.tensor_networks._cp_als import balanced_terms, cp_als, cp_dense, cp_full_rank, khatri_rao
from pquant_lightning.methods.tensor_networks._layers import FactoredConv, FactoredLayer, plain_weights
from pquant_lightning.methods.tensor_networks._output_fit import fit_cp_matrix, fit_kernel, padded_matrix
from pquant_lightning.methods.tensor_networks._sizes import matrix_modes

_ROWS = 2  # leading modes that make the rows of the matrix which is decomposed


class CPConv(FactoredConv, kind="cp_conv"):
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

    owns_bias = True
    bias: nn.Parameter | None

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

    def macs_per_position(self) -> int:
        return int(self.spec["rank"] * (self.spec["layer"]["in_features"] + self.spec["layer"]["out_features"]))

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
class CPCompression(TensorNetworkMethod):
    """CP of Conv and ConvTranspose layers with a kernel, and of Linear layers, at the start of fit, by stable ALS.

    The sizes of a Linear are split into two factors each, with a `rank` balanced ones (padded where they have none).
    Give at most one of `rank` and `param_ratio`; none means `rank=64`. Grouped convolutions are decomposed group by
    group.

    Args:
        rank: number of rank-one terms, per group, a count; at most as many as make the decomposition exact.
        param_ratio: share of each layer's weights that is kept, in (0, 1], less what one more term would add; gives the
            rank per layer, and the split of a Linear's sizes: as even as it can be without more multiply-accumulates
            than before.
        data_aware: fit the factors to the inputs of the layers, which are measured on samples of the training data, for
            the least error of the outputs. None does so where there are data and no training follows: in
            `compress_model` with a `train_loader`, not in a Trainer.
        num_samples: samples of the training data to measure the inputs on.
        max_statistics_bytes: what the measured moments may take at a time; more than that are measured in several
            passes.
        include: glob patterns over module names; only matching layers are changed. None means all but the output layer,
            in models of three layers or more, and layers whose ranks would keep less than three quarters of a
            `param_ratio`.
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

    def validate_config(self) -> None:
        super().validate_config()
        check_rank_or_share(type(self), *self.target())

    def target(self) -> tuple[str, Any]:
        return one_of(type(self), {"rank": 64}, rank=self.rank, param_ratio=self.param_ratio)

    def why_not(self, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.Linear):
            return "has a side of length 1: it is a vector" if min(layer.weight.shape) == 1 else None
        return why_no_kernel(layer)

    def spec_for(self, layer: nn.Module, target: str, value: Any, moments: InputMoments | None) -> dict[str, Any] | str:
        spec: dict[str, Any] = {"kind": CPConv.kind}
        if isinstance(layer, nn.Linear):
            row_modes, column_modes = _modes_for(layer, value if target == "param_ratio" else 0.0)
            spec = {"kind": CPLinear.kind, "row_modes": list(row_modes), "column_modes": list(column_modes)}
        groups, *modes = cp_tensor(layer, spec).shape
        rank = int(value * weight_of(layer).numel() / (groups * sum(modes))) if target == "param_ratio" else value
        if rank < 1:
            return f"even rank 1 keeps more than {value:.0%} of its weights"
        return {**spec, "rank": min(rank, cp_full_rank(modes, _ROWS))}

    def factors_for(self, layer: nn.Module, spec: dict[str, Any], moments: InputMoments | None) -> list[Tensor]:
        tensor, rank = cp_tensor(layer, spec), spec["rank"]
        if moments is None:
            return cp_als(tensor, rank, _ROWS)
        moment = output_moment(layer, moments)
        if isinstance(layer, nn.Linear):
            return fit_cp_matrix(layer.weight.detach(), moment[0], (spec["row_modes"], spec["column_modes"]), rank)
        left, inner = fit_kernel(tensor.permute(0, 3, 2, 1), moment, lambda whole: _split(whole, rank))
        return balanced_terms([*_rank_one(inner), left])


def _modes_for(layer: nn.Linear, share: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The modes of rows and columns, as even as can be, with which terms that hold a share of the weights are fast.

    A term holds `sum(modes)` numbers and takes `in + out` multiply-accumulates per row: where there are so many terms
    that they would take more than the weight, the modes are less even, and each term holds more. With modes of
    (1, out) and (1, in) the terms are those of the SVD.
    """
    out, in_ = layer.weight.shape
    balanced = matrix_modes(layer.weight.shape, 2)
    splits = [
        ((rows, out // rows), (in_ // columns, columns))
        for rows in range(1, math.isqrt(out) + 1)
        for columns in range(1, math.isqrt(in_) + 1)
        if out % rows == 0 and in_ % columns == 0
    ]

    def held(modes: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
        return sum(map(sum, modes))

    enough = [modes for modes in (balanced, *splits) if held(modes) >= share * (in_ + out)]
    return min(enough, key=held)


def _split(kernel: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    by_kernel, inputs, outputs = cp_als(kernel.permute(0, 3, 2, 1), rank, _ROWS)
    return outputs, torch.einsum("gir,gkr->grik", inputs, by_kernel)


def _rank_one(terms: Tensor) -> tuple[Tensor, Tensor]:
    """Factors `(groups, k, R)` and `(groups, in, R)` of terms `(groups, R, in, k)` of rank one."""
    largest = torch.linalg.vector_norm(terms, dim=2, keepdim=True).argmax(-1, keepdim=True)  # (groups, R, 1, 1)
    inputs = terms.gather(3, largest.expand(-1, -1, terms.shape[2], 1)).squeeze(3)  # (groups, R, in)
    squared = inputs.square().sum(-1, keepdim=True).clamp_min(1e-300)
    return (torch.einsum("grik,gri->grk", terms, inputs) / squared).mT, inputs.mT


def cp_tensor(layer: nn.Module, spec: dict[str, Any]) -> Tensor:
    """The weight as the tensor that is decomposed: `(groups, k, in, out)`, or `(1, out_1, out_2, in_1, in_2)`."""
    weight = weight_of(layer).detach().float()
    if "row_modes" not in spec:
        return to_kernel(weight, layer_spec(layer)).flatten(3).permute(0, 3, 2, 1)
    rows, columns = spec["row_modes"], spec["column_modes"]
    return padded_matrix(weight, rows, columns).reshape(1, *rows, *columns)
