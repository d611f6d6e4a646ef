"""Layer kinds of the factorizations that are more than two ordinary layers in a row."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.deploy import SPARSE_FROM, sparse_bytes
from pquant_lightning.core.errors import counted
from pquant_lightning.core.layer_adapter import build_layer
from pquant_lightning.methods.low_rank._factorizations import monarch_matrix
from pquant_lightning.methods.low_rank._layers import (
    LowRankLayer,
    TruncatedSVDConv,
    TruncatedSVDConvTranspose,
    TruncatedSVDEmbedding,
    TruncatedSVDLinear,
)


class _StructuredLinear(CompressedLayer, stage=Stage.FACTORIZE):
    """A Linear as two smaller ordinary layers with permutations around them, and the bias of the old one."""

    first: nn.Module
    second: nn.Module
    bias: nn.Parameter | None

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = cls()
        outputs = spec["layer"]["out_features"]
        layer.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if spec["layer"]["bias"] else None)
        layer.add_layers(spec)
        return layer

    def add_layers(self, spec: dict[str, Any]) -> None:
        """Gives it `first` and `second`."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The weight of the layer this one stands for, computed from the factors; read-only."""
        return self.dense_weight()

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias


class KroneckerLinear(_StructuredLinear, kind="kronecker_linear"):
    """`W = sum_k A_k (x) B_k`: with x as a matrix X (n1, n2), the output is `sum_k A_k X B_k^T`.

    `first`, `Linear(n2, r * m2)`, holds all B_k and is applied to each row of X; `second`, `Linear(n1 * r, m1)`, all
    A_k. Spec: `rank` r and `sizes` (m1, n1).
    """

    def add_layers(self, spec: dict[str, Any]) -> None:
        (m1, n1), rank = spec["sizes"], spec["rank"]
        m2, n2 = spec["layer"]["out_features"] // m1, spec["layer"]["in_features"] // n1
        self.first = nn.Linear(n2, rank * m2, bias=False)
        self.second = nn.Linear(n1 * rank, m1, bias=False)

    def set_factors(self, a: Tensor, b: Tensor) -> None:
        """Copies A `(r, m1, n1)` and B `(r, m2, n2)` into the two layers."""
        weight_of(self.first).copy_(b.flatten(0, 1))
        weight_of(self.second).copy_(a.permute(1, 2, 0).flatten(1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `(r, m1, n1)` and B `(r, m2, n2)`."""
        rank = self.spec["rank"]
        a = weight_of(self.second).unflatten(1, (-1, rank)).permute(2, 0, 1)
        return a, weight_of(self.first).unflatten(0, (rank, -1))

    def dense_weight(self) -> Tensor:
        a, b = self.factors()
        product = torch.einsum("kij,kpq->ipjq", a, b)  # (m1, m2, n1, n2)
        return product.flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        (_, n1), rank = self.spec["sizes"], self.spec["rank"]
        inner = self.first(x.unflatten(-1, (n1, -1)))  # (..., n1, r * m2)
        inner = inner.unflatten(-1, (rank, -1)).movedim(-1, -3).flatten(-2)  # (..., m2, n1 * r)
        return self._with_bias(self.second(inner).transpose(-1, -2).flatten(-2))

    def described(self) -> str:
        m1, n1 = self.spec["sizes"]
        return f"Kronecker, {counted(self.spec['rank'], 'term')} of {m1}x{n1}"


class MonarchLinear(_StructuredLinear, kind="monarch_linear"):
    """Two block-diagonal matrices, as grouped pointwise convolutions, with a permutation between them and after them.

    The rows of all samples lie along the convolutions' length. Spec: `rank` of each block, and `blocks`.
    """

    def add_layers(self, spec: dict[str, Any]) -> None:
        blocks, width = spec["blocks"], spec["blocks"] ** 2 * spec["rank"]
        self.first = nn.Conv1d(spec["layer"]["in_features"], width, 1, groups=blocks, bias=False)
        self.second = nn.Conv1d(width, spec["layer"]["out_features"], 1, groups=blocks, bias=False)

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Copies the factors of `monarch` into the two layers."""
        weight_of(self.first).copy_(right.flatten(0, 1)[..., None])
        weight_of(self.second).copy_(left.flatten(0, 1)[..., None])

    def dense_weight(self) -> Tensor:
        blocks = self.spec["blocks"]
        left, right = (weight_of(layer)[..., 0].unflatten(0, (blocks, -1)) for layer in (self.second, self.first))
        return monarch_matrix(left, right)

    def forward(self, x: Tensor) -> Tensor:
        blocks, rank = self.spec["blocks"], self.spec["rank"]
        if not torch.compiler.is_compiling() and x.numel() == 0:  # a convolution takes no length of 0
            return self._with_bias(x @ self.dense_weight().T)
        inner = self.first(x.flatten(0, -2).T if x.dim() > 1 else x[:, None])  # (blocks * blocks * r, rows)
        inner = inner.unflatten(0, (blocks, blocks, rank)).transpose(0, 1).flatten(0, 2)
        y = self.second(inner).unflatten(0, (blocks, -1)).transpose(0, 1).flatten(0, 1)  # (out, rows)
        return self._with_bias(y.T.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[:, 0])

    def described(self) -> str:
        return f"Monarch, {self.spec['blocks']} blocks of rank {self.spec['rank']}"


class _SparseLowRank(LowRankLayer):
    """A low-rank layer and beside it one of the same type as before, in which only few weights are not zero.

    The zeros are kept in training (`project`), and left out of files. Spec: `rank`, and `nonzeros` of `sparse`.
    """

    sparse: nn.Module

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = super().from_spec(spec, replaced)
        without = {"bias": False} if "bias" in spec["layer"] else {}
        layer.sparse = build_layer({**spec["layer"], **without})
        return layer

    def left_out_bytes(self) -> int:
        weight = weight_of(self.sparse)
        dense, stored = weight.numel() * weight.element_size(), sparse_bytes(weight, self.spec["nonzeros"])
        return dense - stored if stored <= SPARSE_FROM * dense else 0

    def dense_weight(self) -> Tensor:
        return super().dense_weight() + weight_of(self.sparse)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.sparse(x)

    def described(self) -> str:
        share = self.spec["nonzeros"] / weight_of(self.sparse).numel()
        return f"low rank {self.spec['rank']} + {share:.1%} of the weights"


class SparseLowRankLinear(_SparseLowRank, TruncatedSVDLinear, kind="sparse_low_rank_linear"):
    """Linear as a low-rank and a sparse one."""


class SparseLowRankConv(_SparseLowRank, TruncatedSVDConv, kind="sparse_low_rank_conv"):
    """Conv as a low-rank and a sparse one."""


class SparseLowRankConvTranspose(_SparseLowRank, TruncatedSVDConvTranspose, kind="sparse_low_rank_conv_transpose"):
    """ConvTranspose as a low-rank and a sparse one."""


class SparseLowRankEmbedding(_SparseLowRank, TruncatedSVDEmbedding, kind="sparse_low_rank_embedding"):
    """Embedding as a low-rank and a sparse one."""
