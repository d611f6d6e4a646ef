"""Low-rank layers: two thin ordinary layers that stand for one, for every type of layer and way to split it."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, find_kind, weight_of
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import build_layer, layer_spec
from pquant_lightning.methods.low_rank import _truncated_svd

Factors = tuple[Tensor, Tensor, Tensor]


class LowRankLayer(CompressedLayer, stage=Stage.FACTORIZE):
    """`second(first(x))`; the weight, as matrices (groups, m, n), is left @ right, (groups, m, r) @ (groups, r, n)."""

    resizable = True
    first: nn.Module
    second: nn.Module

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = cls()
        layer.first, layer.second = (build_layer(factor) for factor in cls.factor_specs(spec["layer"], spec["rank"]))
        return layer

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Structures of the two ordinary layers that stand for `layer`."""
        raise NotImplementedError

    @staticmethod
    def to_matrix(weight: Tensor, groups: int) -> Tensor:
        """The layer's weight as `(groups, m, n)`."""
        return weight.reshape(groups, weight.shape[0] // groups, -1)

    @staticmethod
    def from_matrix(matrix: Tensor, window: tuple[int, ...]) -> Tensor:
        """The weight, from `(groups, m, n)`: the inverse of `to_matrix`. Linear layers have no window."""
        return matrix.reshape(matrix.shape[0] * matrix.shape[1], -1, *window)

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Copies `(groups, m, r)` and `(groups, r, n)` into the two layers."""
        _copy(self.first, right)
        _copy(self.second, left)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The two layers' weights as `(groups, m, r)` and `(groups, r, n)`."""
        groups, rank = self.spec["layer"].get("groups", 1), self.spec["rank"]
        right = weight_of(self.first).reshape(groups, rank, -1)
        return weight_of(self.second).reshape(groups, -1, rank), right

    def dense_weight(self) -> Tensor:
        left, right = self.factors()
        return self.from_matrix(left @ right, tuple(self.spec["layer"].get("kernel_size", ())))

    @property
    def weight(self) -> Tensor:
        """The weight of the layer this one stands for, computed from the factors; read-only."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer this one stands for; embeddings have none."""
        if "bias" not in self.spec["layer"]:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'bias'")
        found: Tensor | None = self.second.bias  # type: ignore[assignment]
        return found

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out

    def described(self) -> str:
        return f"low rank {self.spec['rank']}"


def _copy(layer: nn.Module, values: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_(values.reshape(weight.shape))


class TruncatedSVDLinear(LowRankLayer, kind="low_rank_linear"):
    """`Linear(in, out)` as `Linear(in, r, bias=False)` and `Linear(r, out)`.

    >>> linear = nn.Linear(16, 12)
    >>> low_rank = TruncatedSVDLinear.from_linear(linear, rank=12)
    >>> torch.allclose(low_rank(torch.ones(2, 16)), linear(torch.ones(2, 16)), atol=1e-5)
    True
    """

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {**layer, "out_features": rank, "bias": False}, {**layer, "in_features": rank}

    tied_parameters = ("second.weight",)

    @classmethod
    def from_linear(cls, layer: nn.Linear, rank: int = 64) -> "TruncatedSVDLinear":
        """The best approximation of a linear layer of that rank (at most `min(in, out)`).

        Raises:
            OptionError: it is no `nn.Linear`, or the rank is below 1.
        """
        if type(layer) is not nn.Linear or rank < 1:
            raise OptionError(f"from_linear takes an nn.Linear and a rank of at least 1, got {layer!r}, rank={rank!r}.")
        new = factorize(layer, rank)
        assert isinstance(new, TruncatedSVDLinear)
        return new


class TruncatedSVDConv(LowRankLayer, kind="low_rank_conv"):
    """`Conv(in, out, k)` as `Conv(in, g*r, k, bias=False)` and a 1x1 `Conv(g*r, out)`, each with the g groups."""

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        width = layer["groups"] * rank
        return {**layer, "out_channels": width, "bias": False}, {**_pointwise(layer), "in_channels": width}


class TruncatedSVDSpatialConv(LowRankLayer, kind="low_rank_spatial_conv"):
    """`Conv2d(in, out, (h, w))` as `Conv2d(in, g*r, (h, 1), bias=False)` and `Conv2d(g*r, out, (1, w))`, g groups each.

    The matrices are (out * w) x (in * h) per group. Strides, dilations and margins of the two directions go with
    their kernels.
    """

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        width = layer["groups"] * rank
        down, across = _one_direction(layer, 0), _one_direction(layer, 1)
        return {**down, "out_channels": width, "bias": False}, {**across, "in_channels": width}

    @staticmethod
    def to_matrix(weight: Tensor, groups: int) -> Tensor:
        out, in_, height, width = weight.shape
        grouped = weight.reshape(groups, out // groups, in_, height, width)
        return grouped.permute(0, 1, 4, 2, 3).reshape(groups, out // groups * width, in_ * height)

    @staticmethod
    def from_matrix(matrix: Tensor, window: tuple[int, ...]) -> Tensor:
        height, width = window
        grouped = matrix.unflatten(2, (-1, height)).unflatten(
            1, (-1, width)
        )  # (groups, out / groups, width, in, height)
        return grouped.permute(0, 1, 3, 4, 2).flatten(0, 1)

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        groups, rank, width = left.shape[0], left.shape[2], self.spec["layer"]["kernel_size"][1]
        _copy(self.first, right)
        _copy(self.second, left.reshape(groups, -1, width, rank).transpose(2, 3))

    def factors(self) -> tuple[Tensor, Tensor]:
        groups, rank = self.spec["layer"]["groups"], self.spec["rank"]
        width = self.spec["layer"]["kernel_size"][1]
        across = weight_of(self.second).reshape(groups, -1, rank, width).transpose(2, 3)
        return across.reshape(groups, -1, rank), weight_of(self.first).reshape(groups, rank, -1)


class TruncatedSVDConvTranspose(LowRankLayer, kind="low_rank_conv_transpose"):
    """`ConvTranspose(in, out, k)` as a 1x1 `Conv(in, g*r, bias=False)` and `ConvTranspose(g*r, out, k)`."""

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        width = layer["groups"] * rank
        pointwise = {**_pointwise(layer), "type": layer["type"].replace("Transpose", ""), "bias": False}
        return {**pointwise, "out_channels": width}, {**layer, "in_channels": width}

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        _copy(self.first, left.transpose(1, 2))
        _copy(self.second, right)

    def factors(self) -> tuple[Tensor, Tensor]:
        groups, rank = self.spec["layer"]["groups"], self.spec["rank"]
        left = weight_of(self.first).reshape(groups, rank, -1).transpose(1, 2)
        return left, weight_of(self.second).reshape(groups, rank, -1)


class TruncatedSVDEmbedding(LowRankLayer, kind="low_rank_embedding"):
    """`Embedding(num, dim)` as `Embedding(num, r)` and `Linear(r, dim, bias=False)`."""

    tied_parameters = ("first.weight",)

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        second = {"type": "Linear", "in_features": rank, "out_features": layer["embedding_dim"], "bias": False}
        return {**layer, "embedding_dim": rank}, second

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        _copy(self.first, left)
        _copy(self.second, right.transpose(1, 2))

    def factors(self) -> tuple[Tensor, Tensor]:
        return weight_of(self.first)[None], weight_of(self.second).T[None]


def _pointwise(conv: dict[str, Any]) -> dict[str, Any]:
    one = [1] * len(conv["kernel_size"])
    plain = {"kernel_size": one, "stride": one, "padding": 0, "dilation": one, "padding_mode": "zeros"}
    return {key: value for key, value in {**conv, **plain}.items() if key != "output_padding"}


def _one_direction(conv: dict[str, Any], dim: int) -> dict[str, Any]:
    """The convolution along one of its two dimensions alone."""

    def only(values: Any, neutral: int) -> Any:
        return values if isinstance(values, str) else [v if d == dim else neutral for d, v in enumerate(values)]

    neutral = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}
    return {**conv, **{key: only(conv[key], value) for key, value in neutral.items()}}


Kind = type[LowRankLayer]

_KINDS: dict[type[nn.Module], Kind] = {
    nn.Linear: TruncatedSVDLinear,
    nn.Conv1d: TruncatedSVDConv,
    nn.Conv2d: TruncatedSVDConv,
    nn.Conv3d: TruncatedSVDConv,
    nn.ConvTranspose1d: TruncatedSVDConvTranspose,
    nn.ConvTranspose2d: TruncatedSVDConvTranspose,
    nn.ConvTranspose3d: TruncatedSVDConvTranspose,
    nn.Embedding: TruncatedSVDEmbedding,
}


def kinds_of(layer: nn.Module) -> list[Kind]:
    """The ways to split an ordinary layer: by channel first, and by the two directions of a window if it has them."""
    windowed = type(layer) is nn.Conv2d and min(layer.kernel_size) > 1
    return [_KINDS[type(layer)], *([TruncatedSVDSpatialConv] if windowed else [])]


def find_low_rank_kind(name: str) -> Kind:
    """The low-rank kind of that name."""
    kind = find_kind(name)
    assert issubclass(kind, LowRankLayer)
    return kind


def weight_matrix(layer: nn.Module, kind: Kind | None = None) -> Tensor:
    """The weight of an ordinary layer as the matrices that are factorized, `(groups, m, n)`."""
    return (kind or _KINDS[type(layer)]).to_matrix(weight_of(layer), getattr(layer, "groups", 1))


def low_rank_spec(layer: nn.Module, rank: int, kind: Kind | None = None) -> dict[str, Any]:
    """The spec of the low-rank layer that stands for an ordinary layer."""
    return {"kind": (kind or _KINDS[type(layer)]).kind, "layer": layer_spec(layer), "rank": rank}


def factorize(layer: nn.Module, rank: int) -> LowRankLayer:
    """The low-rank layer that is nearest to an ordinary layer in the Frobenius norm.

    Args:
        layer: Linear, Conv, ConvTranspose or Embedding.
        rank: kept singular values per group; at most the smaller side of the matrix is used.
    """
    rank = min(rank, *weight_matrix(layer).shape[1:])
    new = CompressedLayer.build(low_rank_spec(layer, rank), layer)
    assert isinstance(new, LowRankLayer)
    with torch.no_grad():
        fill_factors(new, layer, _truncated_svd.truncated_svd(weight_matrix(layer), rank))
    return new


def fill_factors(new: LowRankLayer, old: nn.Module, factors: Factors) -> None:
    """Balanced factors U sqrt(S) | sqrt(S) V: equally scaled halves fine-tune well; an uneven split diverges.

    Args:
        new: the layer to fill.
        old: the ordinary layer it stands for; its bias becomes the new layer's.
        factors: U (groups, m, r), S (groups, r), Vh (groups, r, n).
    """
    u, s, vh = factors
    root = s.sqrt()
    new.set_factors(u * root.unsqueeze(-2), root.unsqueeze(-1) * vh)
    bias = getattr(old, "bias", None)
    if bias is not None:
        new.second.bias = bias  # the same Parameter: ties and optimizer entries stay
