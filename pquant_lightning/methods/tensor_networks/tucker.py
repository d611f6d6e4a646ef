"""Tucker-2: a convolution as 1x1, a smaller one, 1x1; the two channel modes are compressed, the kernel is kept."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.moments import InputMoments
from pquant_lightning.core.options import check_rank_or_share, one_of
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.tensor_networks._base import TensorNetworkMethod, output_moment
from pquant_lightning.methods.tensor_networks._convs import from_kernel, pointwise, spatial, to_kernel, why_no_kernel
from pquant_lightning.methods.tensor_networks._layers import FactoredConv
from pquant_lightning.methods.tensor_networks._output_fit import fit_kernel, seen_kernel
from pquant_lightning.methods.tensor_networks._tucker2 import tucker2, tucker2_dense, tucker2_ranks

_BALANCE = 1 / 3  # of the exponent: three parts share the weight's scale


class TuckerConv(FactoredConv, kind="tucker_conv"):
    """`Conv(in, out, k)` as 1x1 `Conv(in, g*r_in)`, `Conv(g*r_in, g*r_out, k)`, 1x1 `Conv(g*r_out, out)`, g groups."""

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        layer, (rank_in, rank_out) = spec["layer"], spec["ranks"]
        channels = layer["in_channels"] // layer["groups"], layer["out_channels"] // layer["groups"]
        first = pointwise(layer, channels[0], rank_in)
        return [first, spatial(layer, rank_in, rank_out), pointwise(layer, rank_out, channels[1], layer["bias"])]

    def set_factors(self, factors: Sequence[Tensor], bias: nn.Parameter | None) -> None:
        """Takes `left (groups, out, r_out)`, `core (groups, r_out, r_in, k)`, `right (groups, in, r_in)`."""
        left, core, right = factors
        one = (1,) * len(self.spec["layer"]["kernel_size"])
        kernels = [right.mT.unflatten(-1, (-1, *one)), core, left.unflatten(-1, (-1, *one))]
        specs = self.part_specs(self.spec)
        self.set_weights([from_kernel(kernel, spec) for kernel, spec in zip(kernels, specs, strict=True)], bias)

    def dense_weight(self) -> Tensor:
        specs = self.part_specs(self.spec)
        right, core, left = (to_kernel(w, spec) for w, spec in zip(self.weights(), specs, strict=True))
        dense = tucker2_dense(left.flatten(2), core.flatten(3), right.flatten(2).mT)
        layer = self.spec["layer"]
        return from_kernel(dense.unflatten(-1, layer["kernel_size"]), layer)

    def described(self) -> str:
        return f"Tucker-2 {self.spec['ranks'][0]}-{self.spec['ranks'][1]}"


@CompressionMethodRegistry.register("tucker")
class TuckerCompression(TensorNetworkMethod):
    """Tucker-2 of Conv and ConvTranspose layers with a kernel, at the start of fit, by HOSVD and three HOOI sweeps.

    Give at most one of `rank` and `param_ratio`; none means `param_ratio=0.5`. Grouped convolutions are decomposed
    group by group and stay grouped. A matrix (Linear, Embedding, a 1x1 convolution) has no kernel and is left alone.

    Args:
        rank: of both channel modes, per group, a count; at most the channels of each.
        param_ratio: share of each layer's weights that is kept, in (0, 1], less what raising a rank would add; gives
            the two ranks of least error.
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
        Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications",
        2015; there, ranks come from EVBMF.

    >>> TuckerCompression(rank=4).plan(nn.Sequential(nn.Conv2d(16, 32, 3))).layers[0].spec["ranks"]
    [4, 4]
    """

    rank: int | None = None
    param_ratio: float | None = None

    def validate_config(self) -> None:
        super().validate_config()
        check_rank_or_share(type(self), *self.target())

    def target(self) -> tuple[str, Any]:
        return one_of(type(self), {"param_ratio": 0.5}, rank=self.rank, param_ratio=self.param_ratio)

    def why_not(self, layer: nn.Module) -> str | None:
        return why_no_kernel(layer)

    def spec_for(self, layer: nn.Module, target: str, value: Any, moments: InputMoments | None) -> dict[str, Any] | str:
        kernel = merged_kernel(layer)
        if target == "rank":
            ranks: tuple[int, int] | None = (min(value, kernel.shape[1]), min(value, kernel.shape[2]))
        else:
            seen = kernel if moments is None else seen_kernel(kernel, output_moment(layer, moments))
            ranks = tucker2_ranks(seen, value * kernel[0].numel())
        if ranks is None:
            return f"even ranks of 1 keep more than {value:.0%} of its weights"
        return {"kind": TuckerConv.kind, "ranks": [ranks[1], ranks[0]]}

    def factors_for(self, layer: nn.Module, spec: dict[str, Any], moments: InputMoments | None) -> list[Tensor]:
        kernel, (rank_in, rank_out) = merged_kernel(layer), spec["ranks"]
        if moments is not None:
            left, inner = fit_kernel(
                kernel, output_moment(layer, moments), lambda whole: _split(whole, (rank_out, rank_in))
            )
            kernel = (left @ inner.flatten(2)).unflatten(2, inner.shape[2:])  # of these ranks: the rest is exact
        return _balanced(*tucker2(kernel, (rank_out, rank_in)))


def _split(kernel: Tensor, ranks: tuple[int, int]) -> tuple[Tensor, Tensor]:
    left, core, right = tucker2(kernel, ranks)
    return left, torch.einsum("gqrk,gir->gqik", core, right)


def merged_kernel(layer: nn.Module) -> Tensor:
    """A convolution's weight as `(groups, out, in, k)`, all kernel positions in one mode, float32."""
    return to_kernel(weight_of(layer).detach().float(), layer_spec(layer)).flatten(3)


def _balanced(left: Tensor, core: Tensor, right: Tensor) -> list[Tensor]:
    """The same product with the core's scale shared by the three parts: parts of one scale train well."""
    by_out = torch.linalg.vector_norm(core, dim=(2, 3)).clamp_min(1e-12).pow(_BALANCE)  # (groups, r_out)
    by_in = torch.linalg.vector_norm(core, dim=(1, 3)).clamp_min(1e-12).pow(_BALANCE)  # (groups, r_in)
    core = core / by_out[:, :, None, None] / by_in[:, None, :, None]
    return [left * by_out.unsqueeze(1), core, right * by_in.unsqueeze(1)]
