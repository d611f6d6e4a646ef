"""Layers whose weight is a tensor train: a linear map and a table of matrix cores, a convolution as several."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pquant_lightning.core._private import TENSOR_VERSION
from pquant_lightning.methods.tensor_networks._contraction import TrainShape, merged, multiply, to_core
from pquant_lightning.methods.tensor_networks._convs import from_kernel, pointwise, spatial, to_kernel
from pquant_lightning.methods.tensor_networks._layers import FactoredConv, FactoredLayer, plain_weights
from pquant_lightning.methods.tensor_networks._tt_svd import tt_dense


class _TrainMatrix(FactoredLayer):
    """A weight `(rows, columns)`, padded to products of modes, as a train of cores `(r_k, row_k, column_k, r_{k+1})`.

    The cores lie in ordinary layers. Outside of training, and where no gradient is asked for, the weight is rebuilt
    once and kept until a core changes; it is no buffer, and neither a checkpoint nor a copy of the layer holds it.
    """

    shape: TrainShape
    size: tuple[int, int]  # rows and columns of the weight, without padding
    bias: nn.Parameter | None
    _kept: tuple[Any, Tensor] | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = super().from_spec(spec, replaced)
        layer.shape, layer.size = train_shape(spec), matrix_size(spec["layer"])
        layer._kept = None
        return layer

    @staticmethod
    def to_part(core: Tensor) -> Tensor:
        """A core `(r_k, row_k, column_k, r_{k+1})` as the weight of its part."""
        raise NotImplementedError

    @staticmethod
    def to_core(weight: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
        """The inverse of `to_part`."""
        raise NotImplementedError

    def cores(self) -> list[Tensor]:
        """The cores `(r_k, row_k, column_k, r_{k+1})`; views of the parts' weights."""
        return [self.to_core(w, sizes) for w, sizes in zip(self.weights(), self.shape.cores, strict=True)]

    def dense_weight(self) -> Tensor:
        return merged(self.cores())[: self.size[0], : self.size[1]]

    def kept_weight(self, weights: list[Tensor]) -> Tensor:
        """The rebuilt weight, from the last call where no core has changed since; without gradients."""
        state = [(id(w), w.data_ptr(), w.dtype, getattr(w, TENSOR_VERSION)) for w in weights]
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.dense_weight().contiguous())
        return self._kept[1]

    def may_keep(self, weights: list[Tensor]) -> bool:
        """Whether this forward may use `kept_weight`."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not any(weight.is_meta or weight.is_inference() for weight in weights)

    def train(self, mode: bool = True) -> Self:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def set_factors(self, factors: Sequence[Tensor], bias: nn.Parameter | None) -> None:
        """Takes the cores `(1, r_k, row_k * column_k, r_{k+1})` of the train."""
        sizes = self.shape.cores
        self.set_weights([self.to_part(core.reshape(size)) for core, size in zip(factors, sizes, strict=True)], bias)

    def described(self) -> str:
        return f"tensor train {'-'.join(map(str, self.spec['ranks'][1:-1]))}"


class TensorTrainLinear(_TrainMatrix, kind="tensor_train_linear"):
    """`Linear(in, out)` as d small linear maps, each between one mode of the input and one of the output.

    Core k is the weight `(out_k * r_{k+1}, r_k * in_k)` of an `nn.Linear`. The forward takes the order of products that
    costs least for the number of rows: the chain for few, merged cores for more, the rebuilt weight for many.
    """

    owns_bias = True

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"type": "Linear", "in_features": rank * in_, "out_features": out * right, "bias": False}
            for rank, out, in_, right in train_shape(spec).cores
        ]

    def macs_per_position(self) -> int:
        return min(sum(step.macs for step in route.steps) for route in self.shape.routes)

    @staticmethod
    def to_part(core: Tensor) -> Tensor:
        return core.permute(1, 3, 0, 2)

    @staticmethod
    def to_core(weight: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
        return to_core(weight, sizes)

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        weights, shape = plain_weights(self.parts), self.shape
        if weights is None:
            return self._finished(self._call_parts(self._padded(rows)), x)
        if shape.prefers_dense(rows.shape[0]) and self.may_keep(weights):
            return F.linear(x, self.kept_weight(weights), self.bias)
        route = shape.cheapest(rows.shape[0])
        if route == 0:
            return F.linear(x, self.dense_weight(), self.bias)
        return self._finished(multiply(self._padded(rows), weights, shape, route), x)

    def _padded(self, rows: Tensor) -> Tensor:
        missing = self.shape.in_size - rows.shape[-1]
        return F.pad(rows, (0, missing)) if missing else rows

    def _finished(self, out: Tensor, x: Tensor) -> Tensor:
        """Without padding, with the bias, in the shape of the input."""
        out_features = self.size[0]
        if out.shape[-1] > out_features:
            out = out[:, :out_features]
        if (bias := self.bias) is not None:
            out = out + bias
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out_features)

    def _call_parts(self, x: Tensor) -> Tensor:
        """The chain, layer by layer."""
        rest = x.shape[-1]
        for part, (rank, _, in_, _) in zip(self.parts, self.shape.cores, strict=True):
            rest //= in_
            x = part(x.reshape(-1, rank * in_, rest).transpose(1, 2)).transpose(1, 2)
        return x.reshape(-1, self.shape.out_size)


class TensorTrainEmbedding(_TrainMatrix, kind="tensor_train_embedding"):
    """`Embedding(num, dim)` as d small tables, one per digit of the index; their entries are matrices to multiply.

    Core k is the weight `(num_k, r_k * dim_k * r_{k+1})` of an `nn.Embedding`. The row of a `padding_idx` is zero. An
    index that lies in the padding of the table is an error on the CPU, and not looked for elsewhere.
    """

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"type": "Embedding", "num_embeddings": num, "embedding_dim": rank * dim * right}
            for rank, num, dim, right in train_shape(spec).cores
        ]

    def macs_per_position(self) -> int:
        return self.shape.look_up.macs

    @staticmethod
    def to_part(core: Tensor) -> Tensor:
        return core.transpose(0, 1)

    @staticmethod
    def to_core(weight: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
        rank, num, dim, right = sizes
        return weight.reshape(num, rank, dim, right).transpose(0, 1)

    def dense_weight(self) -> Tensor:
        weight = super().dense_weight()
        padding = self.spec["layer"]["padding_idx"]
        if padding is None:
            return weight
        keep = (torch.arange(weight.shape[0], device=weight.device) != padding).to(weight.dtype)
        return weight * keep.unsqueeze(-1)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = plain_weights(self.parts)
        if weights is not None and self.may_keep(weights):
            return F.embedding(tokens, self.kept_weight(weights))
        if weights is not None and self.shape.routes[0].fixed < self.shape.look_up.cost(tokens.numel()):
            return F.embedding(tokens, self.dense_weight())
        out = self._look_up(tokens.reshape(-1))[:, : self.size[1]].reshape(*tokens.shape, self.size[1])
        padding = self.spec["layer"]["padding_idx"]
        return out if padding is None else out * (tokens != padding).to(out.dtype).unsqueeze(-1)

    def _check_range(self, tokens: Tensor) -> None:
        padded = self.shape.out_size > self.size[0]
        if not padded or tokens.device.type != "cpu" or tokens.numel() == 0 or torch.compiler.is_compiling():
            return
        if (largest := int(tokens.max())) >= self.size[0]:
            raise IndexError(f"index {largest} is out of range of an embedding of {self.size[0]} rows.")

    def _look_up(self, tokens: Tensor) -> Tensor:
        """Rows `(tokens, padded dim)`: a product of one small matrix per digit of the index."""
        self._check_range(tokens)
        rows = None
        place = self.shape.out_size
        for part, (rank, num, dim, right) in zip(self.parts, self.shape.cores, strict=True):
            place //= num
            digit = tokens // place
            core = part(digit if rows is None else digit % num)  # the first one must be in range by itself
            if rows is None:
                rows = core.reshape(-1, dim, right)
            else:
                rows = (rows @ core.reshape(-1, rank, dim * right)).reshape(-1, rows.shape[1] * dim, right)
        assert rows is not None
        return rows.flatten(1)


class TensorTrainConv(FactoredConv, kind="tensor_train_conv"):
    """`Conv(in, out, k)` as a 1x1 conv, one along each spatial dimension, and a 1x1 conv; ConvTranspose as well."""

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        layer, ranks = spec["layer"], spec["ranks"]
        channels = layer["out_channels"] // layer["groups"], layer["in_channels"] // layer["groups"]
        inner = [
            spatial(layer, ranks[k], ranks[k + 1], dims) for k, dims in enumerate(kernel_steps(layer["kernel_size"]), 1)
        ]
        first, last = pointwise(layer, channels[1], ranks[1]), pointwise(layer, ranks[-2], channels[0], layer["bias"])
        return [first, *inner, last]

    def set_factors(self, cores: list[Tensor], bias: nn.Parameter | None) -> None:
        """Takes a train over the modes in, kernel, ..., out: `(groups, r_k, n_k, r_{k+1})` each."""
        steps = kernel_steps(self.spec["layer"]["kernel_size"])
        kernels = [cores[0].transpose(1, 3)]  # (groups, r_1, in, 1)
        kernels += [core.permute(0, 3, 1, 2) for core in cores[1:-1]]  # (groups, right, left, n)
        kernels += [cores[-1].transpose(1, 2)]  # (groups, out, r, 1)
        assert len(kernels) == len(steps) + 2
        specs = self.part_specs(self.spec)
        self.set_weights([from_kernel(kernel, spec) for kernel, spec in zip(kernels, specs, strict=True)], bias)

    def dense_weight(self) -> Tensor:
        kernels = [to_kernel(w, spec) for w, spec in zip(self.weights(), self.part_specs(self.spec), strict=True)]
        cores = [kernels[0].flatten(2).transpose(1, 2).unsqueeze(1)]
        cores += [kernel.flatten(3).permute(0, 2, 3, 1) for kernel in kernels[1:-1]]
        cores += [kernels[-1].flatten(2).transpose(1, 2).unsqueeze(-1)]
        dense = tt_dense(cores)  # (groups, in, *kernel modes, out)
        layer = self.spec["layer"]
        kernel = dense.movedim(-1, 1).reshape(*dense.shape[:1], dense.shape[-1], dense.shape[1], *layer["kernel_size"])
        return from_kernel(kernel, layer)

    def described(self) -> str:
        return f"tensor train {'-'.join(map(str, self.spec['ranks'][1:-1]))}"


def train_shape(spec: dict[str, Any]) -> TrainShape:
    """The sizes in the spec of a matrix train.

    Raises:
        ValueError: the modes do not hold the layer's size, or the ranks do not fit them.
    """
    shape = TrainShape(tuple(spec["row_modes"]), tuple(spec["column_modes"]), tuple(spec["ranks"]))
    rows, columns = matrix_size(spec["layer"])
    counts = {len(shape.out_modes), len(shape.in_modes), len(shape.ranks) - 1}
    if len(counts) > 1 or math.prod(shape.out_modes) < rows or math.prod(shape.in_modes) < columns:
        raise ValueError(f"a train of modes {shape.out_modes} x {shape.in_modes} holds no matrix {rows} x {columns}")
    return shape


def matrix_size(layer: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of the weight of a Linear or an Embedding."""
    if layer["type"] == "Linear":
        return layer["out_features"], layer["in_features"]
    return layer["num_embeddings"], layer["embedding_dim"]


def kernel_steps(kernel_size: Sequence[int]) -> list[list[int]]:
    """The spatial dimensions that each conv of a chain acts on: one each, those of size 1 together with the first."""
    single = [dim for dim, size in enumerate(kernel_size) if size == 1]
    wide = [dim for dim, size in enumerate(kernel_size) if size > 1]
    return [[*single, wide[0]], *([dim] for dim in wide[1:])] if wide else [single]
