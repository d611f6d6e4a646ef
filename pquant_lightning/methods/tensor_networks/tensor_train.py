"""Tensor trains: Linear and Embedding layers by matrix cores, convolutions by a chain of ordinary ones."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.moments import InputMoments
from pquant_lightning.core.options import check_count, check_rank_or_share, one_of
from pquant_lightning.core.plan import LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.tensor_networks._base import TensorNetworkMethod, output_moment
from pquant_lightning.methods.tensor_networks._contraction import merged
from pquant_lightning.methods.tensor_networks._convs import CONVS, to_kernel, why_no_kernel
from pquant_lightning.methods.tensor_networks._layers import random_like
from pquant_lightning.methods.tensor_networks._output_fit import fit_kernel, fit_matrix, padded_matrix
from pquant_lightning.methods.tensor_networks._sizes import matrix_modes
from pquant_lightning.methods.tensor_networks._tensor_train_layers import (
    TensorTrainConv,
    TensorTrainEmbedding,
    TensorTrainLinear,
    kernel_steps,
    train_shape,
)
from pquant_lightning.methods.tensor_networks._tt_refit import refit_cores
from pquant_lightning.methods.tensor_networks._tt_svd import tt_dense, tt_ranks, tt_svd

_Matrix = TensorTrainLinear | TensorTrainEmbedding


@CompressionMethodRegistry.register("tensor_train")
class TensorTrainCompression(TensorNetworkMethod):
    """Tensor trains in place of Linear, Embedding, Conv and ConvTranspose layers at the start of fit.

    The sizes of a matrix are split into `num_cores` balanced factors each (padded where they have none, as primes), the
    weight into one core per pair of factors. A convolution becomes 1x1, one conv along each spatial dimension, 1x1.
    Give at most one of `rank`, `param_ratio` and `max_error`; none means `rank=8`.

    On a trained Linear a tensor train loses against the SVD at equal parameters: with a quarter of the weights of a
    trained 1024 x 1024 layer its relative error is 0.82, that of `low_rank` 0.55 (`python
    examples/benchmarks/tensor_networks.py --only trained`). It pays for layers that are trained as trains from the
    start, with `init="random"`: there, 60 times fewer weights cost digits 0.3 % of accuracy (`--only scratch`).

    Args:
        rank: largest rank between two cores, a count; ranks above what the sizes allow are cut to that.
        param_ratio: share of each layer's weights that is kept, in (0, 1], less what raising one more rank would add;
            gives the ranks per layer, about equal where the sizes allow.
        max_error: relative error ||W - W'|| / ||W|| that each layer may have, in (0, 1); gives every rank by itself.
        num_cores: cores of a matrix, at least 2; small layers get fewer.
        init: "decompose" approximates the weight by TT-SVD; "random" draws normal cores whose product has the weight's
            variance, to train from scratch.
        data_aware: fit the factors to the inputs of the layers, which are measured on samples of the training data, for
            the least error of the outputs. None does so where there are data and no training follows: in
            `compress_model` with a `train_loader`, not in a Trainer. Never with `max_error` or
            random cores; embeddings keep the least error of the weight.
        num_samples: samples of the training data to measure the inputs on.
        max_statistics_bytes: what the measured moments may take at a time; more than that are measured in several
            passes.
        include: glob patterns over module names; only matching layers are changed. None means all but the output layer,
            in models of three layers or more, and layers whose ranks would keep less than three quarters of a
            `param_ratio`.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: two of rank, param_ratio and max_error, max_error with random cores, or a value out of range.

    References:
        Oseledets, "Tensor-train decomposition", 2011; Novikov et al., "Tensorizing neural networks", 2015.

    >>> plan = TensorTrainCompression(rank=4).plan(nn.Sequential(nn.Linear(64, 60)))
    >>> plan.layers[0].spec["row_modes"], plan.layers[0].spec["column_modes"], plan.layers[0].spec["ranks"]
    ([3, 4, 5], [4, 4, 4], [1, 4, 4, 1])
    """

    rank: int | None = None
    param_ratio: float | None = None
    max_error: float | None = None
    num_cores: int = 3
    init: Literal["decompose", "random"] = "decompose"

    def validate_config(self) -> None:
        super().validate_config()
        name, value = self.target()
        if name != "max_error":
            check_rank_or_share(type(self), name, value)
        elif not 0 < value < 1:
            raise OptionError(f"{type(self).__name__}: max_error is a relative error, in (0, 1), got {value!r}.")
        elif self.init == "random":
            raise OptionError(
                f"{type(self).__name__}: max_error={value!r} approximates the weight, init='random' drops it; give "
                "rank or param_ratio instead."
            )
        if self.data_aware and not self._may_fit:
            raise OptionError(
                f"{type(self).__name__}: data_aware=True bounds the error of the outputs; max_error bounds that of the "
                "weight, and init='random' none. Give rank or param_ratio with init='decompose'."
            )
        check_count(type(self), "num_cores", self.num_cores, low=2)

    @property
    def _may_fit(self) -> bool:
        return self.max_error is None and self.init == "decompose"

    @property
    def wanted_samples(self) -> int:
        return super().wanted_samples if self._may_fit else 0

    def target(self) -> tuple[str, Any]:
        return one_of(type(self), {"rank": 8}, rank=self.rank, param_ratio=self.param_ratio, max_error=self.max_error)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> LayerPlan | Skip:
        if self.max_error is None or (reason := self.why_not(layer)) is not None:
            return super().plan_layer(name, layer, context) if self.max_error is None else Skip(name, str(reason))
        spec = self._modes_of(layer)
        cores, _ = tt_svd(train_tensor(layer, spec), max_error=self.max_error)
        return LayerPlan(name, {**spec, "ranks": [1, *(core.shape[-1] for core in cores)]}, scratch=cores)

    def why_not(self, layer: nn.Module) -> str | None:
        return _why_not(layer)

    def _modes_of(self, layer: nn.Module) -> dict[str, Any]:
        if isinstance(layer, CONVS):
            return {"kind": TensorTrainConv.kind}
        kind = TensorTrainLinear.kind if isinstance(layer, nn.Linear) else TensorTrainEmbedding.kind
        row_modes, column_modes = matrix_modes(weight_of(layer).shape, self.num_cores)
        return {"kind": kind, "row_modes": list(row_modes), "column_modes": list(column_modes)}

    def spec_for(self, layer: nn.Module, target: str, value: Any, moments: InputMoments | None) -> dict[str, Any] | str:
        spec = self._modes_of(layer)
        modes = _modes(layer, spec)
        if target != "param_ratio":
            return {**spec, "ranks": tt_ranks(modes, value)}
        ranks = _ranks_for(modes, value * weight_of(layer).numel() / getattr(layer, "groups", 1))
        return f"even rank 1 keeps more than {value:.0%} of its weights" if ranks is None else {**spec, "ranks": ranks}

    def factors_for(self, layer: nn.Module, spec: dict[str, Any], moments: InputMoments | None) -> list[Tensor]:
        tensor = train_tensor(layer, spec)
        if moments is not None:
            moment = output_moment(layer, moments)
            tensor = _fitted_tensor(layer, spec, moment)  # of these ranks: the rest is exact
        return tt_svd(tensor, spec["ranks"])[0]

    def fill(self, new: Any, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        bias = getattr(old, "bias", None)
        if self.init == "random":
            shapes = [weight.shape for weight in new.weights()]
            new.set_weights(random_like(weight_of(old), shapes, plan.spec["ranks"]), bias)
        elif plan.scratch is not None:
            new.set_factors(plan.scratch, bias)
        else:
            super().fill(new, old, plan, context)


def _fitted_tensor(layer: nn.Module, spec: dict[str, Any], moment: Tensor) -> Tensor:
    """The train of these ranks with the least output error we find, as the tensor that it stands for; float64."""
    ranks = spec["ranks"]
    if "row_modes" in spec:
        return _fitted_matrix(weight_of(layer).detach().double(), moment[0].double(), spec)
    kernel = to_kernel(weight_of(layer).detach().double(), layer_spec(layer)).flatten(3)
    left, inner = fit_kernel(kernel, moment, lambda whole: _split(whole, _modes(layer, spec), ranks))
    fitted = (left @ inner.flatten(2)).unflatten(2, inner.shape[2:])
    return fitted.movedim(1, -1).reshape(len(kernel), *_modes(layer, spec))


def _fitted_matrix(weight: Tensor, moment: Tensor, spec: dict[str, Any]) -> Tensor:
    modes, ranks, shape = (spec["row_modes"], spec["column_modes"]), spec["ranks"], train_shape(spec)

    def approximate(matrix: Tensor) -> Tensor:
        return from_train(tt_dense(tt_svd(to_train(matrix, *modes), ranks)[0]), *modes)

    def refit(matrix: Tensor) -> Tensor:
        cores, _ = tt_svd(to_train(matrix, *modes), ranks)
        sized = [core.reshape(size) for core, size in zip(cores, shape.cores, strict=True)]
        return merged(refit_cores(sized, weight, moment, modes))

    return to_train(fit_matrix(weight, moment, modes, approximate, refit), *modes)


def _split(kernel: Tensor, modes: list[int], ranks: list[int]) -> tuple[Tensor, Tensor]:
    """A train over in, kernel, ..., out of a kernel `(groups, out, in, k)` as its last core and all others."""
    groups, _, channels, size = kernel.shape
    cores, _ = tt_svd(kernel.movedim(1, -1).reshape(groups, *modes), ranks)
    last = torch.eye(ranks[-2], dtype=kernel.dtype, device=kernel.device).expand(groups, -1, -1).unsqueeze(-1)
    inner = tt_dense([*cores[:-1], last]).reshape(groups, channels, size, ranks[-2])
    return cores[-1].squeeze(-1).mT, inner.movedim(-1, 1)


def _why_not(layer: nn.Module) -> str | None:
    """Why a layer cannot be a train."""
    if isinstance(layer, CONVS):
        return why_no_kernel(layer)
    if isinstance(layer, nn.Embedding):
        if layer.max_norm is not None:
            return "its max_norm renormalizes rows, which cores do not have"
        if layer.sparse or layer.scale_grad_by_freq:
            return "its gradients are per row (sparse, scale_grad_by_freq), and cores share theirs between rows"
        if layer.padding_idx is not None and layer.weight[layer.padding_idx].any():
            return "the row of its padding_idx is not zero, and a train keeps only a zero there"
    return "has a side of length 1: it is a vector" if min(weight_of(layer).shape) == 1 else None


def _modes(layer: nn.Module, spec: dict[str, Any]) -> list[int]:
    """Sizes of the tensor that is decomposed, per group of a convolution."""
    if "row_modes" in spec:
        return [row * column for row, column in zip(spec["row_modes"], spec["column_modes"], strict=True)]
    structure = layer_spec(layer)
    groups, size = structure["groups"], structure["kernel_size"]
    kernel = [math.prod(size[dim] for dim in dims) for dims in kernel_steps(size)]
    return [structure["in_channels"] // groups, *kernel, structure["out_channels"] // groups]


def train_tensor(layer: nn.Module, spec: dict[str, Any]) -> Tensor:
    """The weight as the tensor that is decomposed, `(groups, n_1, ..., n_d)`, one mode per core."""
    weight = weight_of(layer).detach().float()
    modes = _modes(layer, spec)
    if "row_modes" not in spec:
        kernel = to_kernel(weight, layer_spec(layer))  # (groups, out, in, *k)
        return kernel.movedim(1, -1).reshape(kernel.shape[0], *modes)
    modes_of = spec["row_modes"], spec["column_modes"]
    return to_train(padded_matrix(weight, *modes_of), *modes_of)


def to_train(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """A matrix as the tensor of a batch of one, `(1, row_1 * column_1, ..., row_d * column_d)`."""
    count = len(rows)
    order = [axis for k in range(count) for axis in (k, count + k)]
    modes = [row * column for row, column in zip(rows, columns, strict=True)]
    return matrix.reshape(*rows, *columns).permute(order).reshape(1, *modes)


def from_train(tensor: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """The inverse of `to_train`."""
    pairs = [size for pair in zip(rows, columns, strict=True) for size in pair]
    order = [*range(0, len(pairs), 2), *range(1, len(pairs), 2)]
    return tensor.reshape(pairs).permute(order).reshape(math.prod(rows), math.prod(columns))


def _ranks_for(modes: list[int], max_params: float) -> list[int] | None:
    """The largest ranks with which a train over these modes holds at most so many numbers; None where there are none.

    All reach one limit, as far as the modes allow; what that leaves goes to single ones.
    """
    limit, found = 0, [0]
    while (ranks := tt_ranks(modes, limit + 1)) != found and _numbers(modes, ranks) <= max_params:
        limit, found = limit + 1, ranks
    if limit == 0:
        return None
    while (more := _raised(modes, found, max_params)) is not None:
        found = more
    return found


def _raised(modes: list[int], ranks: list[int], max_params: float) -> list[int] | None:
    """The ranks with one of them, of the smallest that can be, raised by one; None where none can."""
    for cut in sorted(range(1, len(modes)), key=ranks.__getitem__):
        more = [*ranks[:cut], ranks[cut] + 1, *ranks[cut + 1 :]]
        allowed = more[cut] <= min(more[cut - 1] * modes[cut - 1], more[cut + 1] * modes[cut])
        if allowed and _numbers(modes, more) <= max_params:
            return more
    return None


def _numbers(modes: list[int], ranks: list[int]) -> int:
    """Numbers in the cores of a train."""
    return sum(left * mode * right for left, mode, right in zip(ranks, modes, ranks[1:], strict=False))
