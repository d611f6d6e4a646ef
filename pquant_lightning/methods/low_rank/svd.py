"""Low rank by truncated singular value decomposition: one layer becomes two thin ordinary ones."""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import build_layer, layer_spec
from pquant_lightning.core.options import check_count, check_share, one_of
from pquant_lightning.core.plan import Candidate, LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank._retraction import retract_factors
from pquant_lightning.methods.low_rank._ties import TyingMethod

Factors = tuple[Tensor, Tensor, Tensor]


class _LowRankLayer(CompressedLayer, stage=Stage.FACTORIZE):
    """`second(first(x))`; the weight, as matrices (groups, m, n), is left @ right, (groups, m, r) @ (groups, r, n)."""

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
        rows = left.shape[0] * left.shape[1]
        return (left @ right).reshape(rows, -1, *self.spec["layer"].get("kernel_size", ()))

    @property
    def weight(self) -> Tensor:
        """The weight of the layer this one stands for, computed from the factors; read-only."""
        return self.dense_weight()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out

    def described(self) -> str:
        return f"low rank {self.spec['rank']}"


def _copy(layer: nn.Module, values: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_(values.reshape(weight.shape))


class TruncatedSVDLinear(_LowRankLayer, kind="low_rank_linear"):
    """`Linear(in, out)` as `Linear(in, r, bias=False)` and `Linear(r, out)`.

    >>> linear = nn.Linear(16, 12)
    >>> low_rank = TruncatedSVDLinear.from_linear(linear, rank=12)
    >>> torch.allclose(low_rank(torch.ones(2, 16)), linear(torch.ones(2, 16)), atol=1e-5)
    True
    """

    tied_parameters = ("second.weight",)

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        return {**layer, "out_features": rank, "bias": False}, {**layer, "in_features": rank}

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


class TruncatedSVDConv(_LowRankLayer, kind="low_rank_conv"):
    """`Conv(in, out, k)` as `Conv(in, g*r, k, bias=False)` and a 1x1 `Conv(g*r, out)`, each with the g groups."""

    @staticmethod
    def factor_specs(layer: dict[str, Any], rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        width = layer["groups"] * rank
        return {**layer, "out_channels": width, "bias": False}, {**_pointwise(layer), "in_channels": width}


class TruncatedSVDConvTranspose(_LowRankLayer, kind="low_rank_conv_transpose"):
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


class TruncatedSVDEmbedding(_LowRankLayer, kind="low_rank_embedding"):
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


_KINDS: dict[type[nn.Module], type[_LowRankLayer]] = {
    nn.Linear: TruncatedSVDLinear,
    nn.Conv1d: TruncatedSVDConv,
    nn.Conv2d: TruncatedSVDConv,
    nn.Conv3d: TruncatedSVDConv,
    nn.ConvTranspose1d: TruncatedSVDConvTranspose,
    nn.ConvTranspose2d: TruncatedSVDConvTranspose,
    nn.ConvTranspose3d: TruncatedSVDConvTranspose,
    nn.Embedding: TruncatedSVDEmbedding,
}


def weight_matrix(layer: nn.Module) -> Tensor:
    """The weight of an ordinary layer as the matrices that are factorized, `(groups, m, n)`."""
    return _KINDS[type(layer)].to_matrix(weight_of(layer), getattr(layer, "groups", 1))


def factorize(layer: nn.Module, rank: int, factors: Factors | None = None) -> _LowRankLayer:
    """The low-rank layer that stands for an ordinary layer.

    Args:
        layer: Linear, Conv, ConvTranspose or Embedding.
        rank: kept singular values per group; at most the smaller side of the matrix is used.
        factors: its truncated SVD where it is known already: U (groups, m, r), S (groups, r), Vh (groups, r, n).
    """
    rank = min(rank, *weight_matrix(layer).shape[1:])
    new = CompressedLayer.build(_spec(layer, rank), layer)
    assert isinstance(new, _LowRankLayer)
    with torch.no_grad():
        _fill(new, layer, factors)
    return new


def _spec(layer: nn.Module, rank: int) -> dict[str, Any]:
    return {"kind": _KINDS[type(layer)].kind, "layer": layer_spec(layer), "rank": rank}


def _fill(new: _LowRankLayer, old: nn.Module, factors: Factors | None) -> Tensor:
    """Balanced factors U sqrt(S) | sqrt(S) V: equally scaled halves fine-tune well; an uneven split diverges.

    Returns the singular values, (groups, r).
    """
    u, s, vh = factors or _truncated_svd.truncated_svd(weight_matrix(old), new.spec["rank"])
    root = s.sqrt()
    new.set_factors(u * root.unsqueeze(-2), root.unsqueeze(-1) * vh)
    bias = getattr(old, "bias", None)
    if bias is not None:
        new.second.bias = bias  # the same Parameter: ties and optimizer entries stay
    return s


@CompressionMethodRegistry.register("low_rank")
class LowRankCompression(TyingMethod):
    """Truncated SVD of Linear, Conv, ConvTranspose and Embedding layers at the start of fit.

    Give at most one of `rank`, `energy` and `param_ratio`; none means `rank=64`. A layer that would not get smaller is
    left alone, with the reason in the report, and so is one that shares its weight with another layer.

    Args:
        rank: number of singular values kept per layer (per group of a grouped conv), a count.
        energy: share of each weight's squared Frobenius norm that is kept, in (0, 1]; gives the rank per layer.
        param_ratio: share of each layer's weights that is kept, in (0, 1]; gives the rank per layer.
        method: how factors are found; `"svd"` is the optimal approximation in the Frobenius norm, and
            `"factorization"` makes a `FactorizationCompression` with the other options.
        factorize_ties: factorizes an embedding and a head that share their weight, too: they go on sharing the large
            factor, of a row for each token, while each has a small one of its own. False leaves them alone.
        retract: keeps the factors, after each optimizer step and with the same product, "balanced" (of equal Gram
            matrices) or "orthonormal" (the rows of the first one); None leaves them to the optimizer.
        include: glob patterns over module names; only matching layers are changed. None means all.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: two of rank, energy and param_ratio, or a value out of range.

    References:
        Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
        Jaderberg et al., "Speeding up Convolutional Neural Networks with Low Rank Expansions", 2014 (scheme 1, by
        channel).

    >>> LowRankCompression(param_ratio=0.25).plan(nn.Sequential(nn.Linear(64, 32))).layers[0].spec["rank"]
    5
    """

    rank: int | None = None
    energy: float | None = None
    param_ratio: float | None = None
    method: Literal["svd", "factorization"] = "svd"
    retract: Literal["balanced", "orthonormal"] | None = None

    stage = Stage.FACTORIZE

    def validate_config(self) -> None:
        super().validate_config()
        name, value = self._target()
        if name == "rank":
            check_count(type(self), name, value, low=1)
        else:
            check_share(type(self), name, value)

    def _target(self) -> tuple[str, Any]:
        return one_of(type(self), {"rank": 64}, rank=self.rank, energy=self.energy, param_ratio=self.param_ratio)

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> LayerPlan | Skip:
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm renormalizes rows, which factors do not have")
        target, value = self._target()
        matrix = weight_matrix(layer)
        factors = None
        if target == "energy":
            factors = _truncated_svd.truncated_svd_by_energy(matrix.detach(), value)
            rank = factors[1].shape[-1]
        elif target == "param_ratio":
            rank = int(value * matrix.numel() / (matrix.shape[0] * (matrix.shape[1] + matrix.shape[2])))
            if rank < 1:
                return Skip(name, f"even rank 1 keeps more than {value:.0%} of its weights")
        else:
            rank = value
        kept = {} if self.retract is None else {"retract": self.retract}
        return LayerPlan(name, {**_spec(layer, min(rank, *matrix.shape[1:])), **kept}, scratch=factors)

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        if self.retract is not None:
            retract_factors(model)

    def fill(self, new: _LowRankLayer, old: nn.Module, plan: LayerPlan, context: CompressionContext) -> None:
        kept = _fill(new, old, plan.scratch)
        # the approximation is a projection of W, so ||W - W'||^2 = ||W||^2 - ||S||^2, if that leaves enough digits
        norm = torch.linalg.vector_norm(weight_matrix(old).float())
        lost = float(1 - (torch.linalg.vector_norm(kept.float()) / norm.clamp_min(1e-30)) ** 2)
        if lost > 1e-3:
            context.errors[plan.name] = lost**0.5

    def candidates(self, name: str, module: nn.Module, context: CompressionContext) -> list[Candidate]:
        matrix = weight_matrix(module).detach()
        squares = _truncated_svd.singular_values(matrix).double().square()
        kept = (squares.cumsum(-1).sum(0) / squares.sum().clamp_min(1e-300)).clamp_max(1)
        per_rank = matrix.shape[0] * (matrix.shape[1] + matrix.shape[2])
        top = matrix.numel() // per_rank
        ranks = sorted({max(1, round(top * step / 16)) for step in range(1, 17)})
        size = matrix.element_size()
        return [
            Candidate({"rank": r}, r * per_rank * size, r * per_rank, max(0.0, 1 - float(kept[r - 1])))
            for r in ranks
            if r <= kept.numel()
        ]
