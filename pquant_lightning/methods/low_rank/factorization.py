"""The generic factorization: semi-nonnegative, Kronecker, Monarch, CUR, and sparse plus low rank."""

import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, compressed_layers, weight_of
from pquant_lightning.core.compression_method import CompressionContext, LayerMethod
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.layer_adapter import layer_spec
from pquant_lightning.core.options import check_count, check_rank_or_share, one_of
from pquant_lightning.core.plan import LayerPlan, Skip
from pquant_lightning.core.registry import CompressionMethodRegistry
from pquant_lightning.methods.low_rank import _factorizations as math_of
from pquant_lightning.methods.low_rank._layers import low_rank_spec, weight_matrix
from pquant_lightning.methods.low_rank._structured import (
    KroneckerLinear,
    MonarchLinear,
    SparseLowRankConv,
    SparseLowRankConvTranspose,
    SparseLowRankEmbedding,
    SparseLowRankLinear,
)
from pquant_lightning.methods.low_rank.svd import LowRankCompression

# what a kind is by default, where it asks for it; None elsewhere
_DEFAULTS: dict[str, dict[str, Any]] = {
    "nmf": {"iterations": 30},
    "kronecker": {},
    "monarch": {"blocks": 4},
    "cur": {},
    "sparse_low_rank": {"iterations": 30, "density": None},
}
_SPARSE: dict[str, type[CompressedLayer]] = {
    "low_rank_linear": SparseLowRankLinear,
    "low_rank_conv": SparseLowRankConv,
    "low_rank_conv_transpose": SparseLowRankConvTranspose,
    "low_rank_embedding": SparseLowRankEmbedding,
}


@CompressionMethodRegistry.register("factorization")
class FactorizationCompression(LayerMethod):
    """Replaces weights by products and sums of structured ones, each built of ordinary layers, at the start of fit.

    Give at most one of `rank` and `param_ratio`; none means `param_ratio=0.5`. Linear, Conv, ConvTranspose and
    Embedding layers, all as matrices; Kronecker and Monarch change Linear layers only. A layer that would not get
    smaller is left alone, with the reason in the report.

    Args:
        kind: "sparse_low_rank" adds a few single weights to a low rank; "nmf" has one nonnegative factor, which stays
            so in training; "kronecker" is a sum of Kronecker products; "monarch" are two block-diagonal matrices with
            permutations; "cur" keeps rows of the weight itself.
        rank: a count per layer: columns of the factors, terms of the Kronecker sum, or the rank of each Monarch block.
        param_ratio: share of each layer's weights that is kept, in (0, 1], less what one more rank would add (in
            "sparse_low_rank" the sparse part fills it up); gives the rank per layer.
        blocks: diagonal blocks of a Monarch factor; they divide the layer's sizes. Default: 4.
        density: share of the weights in the sparse part of "sparse_low_rank". Default: half of `param_ratio` or a
            little more, or 0.05 beside a `rank`.
        iterations: of the alternating updates of "nmf" and "sparse_low_rank". Default: 30.
        include: glob patterns over module names; only matching layers are changed. None means all but the output layer,
            in models of three layers or more, and layers whose rank would keep less than three quarters of its share.
        exclude: glob patterns over module names; matching layers are left alone.
        min_saving: least share of a layer's stored bytes that must go, else the layer is left alone; 0 asks nothing.

    Raises:
        OptionError: both of rank and param_ratio, an option of another kind, or a value out of range.

    References:
        See the functions in `_factorizations.py`.

    >>> plan = FactorizationCompression(kind="monarch", rank=2).plan(nn.Sequential(nn.Linear(64, 32)))
    >>> plan.layers[0].spec["kind"], plan.layers[0].spec["blocks"]
    ('monarch_linear', 4)
    """

    kind: Literal["nmf", "kronecker", "monarch", "cur", "sparse_low_rank"] = "sparse_low_rank"
    rank: int | None = None
    param_ratio: float | None = None
    blocks: int | None = None
    density: float | None = None
    iterations: int | None = None

    stage = Stage.FACTORIZE
    protects_output = True
    _constrained: ClassVar[WeakKeyDictionary[nn.Module, list[tuple[nn.Parameter, Tensor | None]]]] = WeakKeyDictionary()

    def validate_config(self) -> None:
        super().validate_config()
        check_rank_or_share(type(self), *self._target())
        for option, low in (("blocks", 2), ("iterations", 1)):
            if getattr(self, option) is not None:
                check_count(type(self), option, getattr(self, option), low=low)
        if self.density is not None and not 0 < self.density < 1:
            raise OptionError(f"FactorizationCompression: density is a share of weights in (0, 1), got {self.density}.")
        for option in ("blocks", "density", "iterations"):
            if getattr(self, option) is not None and option not in _DEFAULTS[self.kind]:
                owners = " and ".join(repr(kind) for kind, options in _DEFAULTS.items() if option in options)
                raise OptionError(f"FactorizationCompression: {option} is an option of {owners}, not of {self.kind!r}.")
        if self.param_ratio is not None and self.density is not None and self.density >= self.param_ratio:
            raise OptionError(
                f"FactorizationCompression: the sparse part alone (density={self.density}) is more than "
                f"param_ratio={self.param_ratio} leaves; give a smaller density."
            )

    def _target(self) -> tuple[str, Any]:
        return one_of(type(self), {"param_ratio": 0.5}, rank=self.rank, param_ratio=self.param_ratio)

    def _option(self, name: str) -> Any:
        given = getattr(self, name)
        return _DEFAULTS[self.kind][name] if given is None else given

    # -- planning ----------------------------------------------------------------------------------------------------

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip:
        if getattr(layer, "max_norm", None) is not None:
            return Skip(name, "its max_norm renormalizes rows, which factors do not have")
        if self.kind in ("kronecker", "monarch"):
            if not isinstance(layer, nn.Linear):
                return Skip(name, f"{self.kind} covers Linear layers only")
            return self._kronecker(name, layer) if self.kind == "kronecker" else self._monarch(name, layer)
        groups, m, n = weight_matrix(layer).shape
        kept = 1.0
        extra: dict[str, Any] = {}
        if self.kind == "sparse_low_rank":
            kept = self._density()
            extra = {"nonzeros": math.floor(kept * groups * m * n)}
        share = (self.param_ratio or 0.5) - (kept if extra else 0.0)
        rank = self._rank(name, groups * m * n, groups * (m + n), share, min(m, n))
        if isinstance(rank, Skip):
            return rank
        if extra and self.rank is None and self.density is None:  # what the rank leaves of the share
            extra = {"nonzeros": math.floor((self.param_ratio or 0.5) * groups * m * n) - groups * (m + n) * rank}
        spec = low_rank_spec(layer, rank)
        kind = _SPARSE[spec["kind"]].kind if extra else spec["kind"]
        return {**spec, "kind": kind, "factorization": self.kind, **extra}

    def _density(self) -> float:
        default = 0.05 if self.rank is not None else (self.param_ratio or 0.5) / 2
        return self.density or default

    def _rank(self, name: str, total: int, per_rank: int, share: float, largest: int) -> int | Skip:
        target, value = self._target()
        if target == "rank":
            return min(int(value), largest)
        rank = int(share * total / per_rank)
        if rank < 1:
            return Skip(name, f"even rank 1 keeps more than {value:.0%} of its weights")
        filled = self.kind == "sparse_low_rank" and self.density is None  # up to the share, by single weights
        if not filled and (reason := self.why_too_coarse(rank * per_rank, share, total)) is not None:
            return Skip(name, reason)
        return min(rank, largest)

    def _kronecker(self, name: str, layer: nn.Linear) -> dict[str, Any] | Skip:
        m, n = layer.weight.shape
        m1, n1 = math_of.kronecker_sizes(m, n)
        left, right = m1 * n1, m * n // (m1 * n1)
        rank = self._rank(name, m * n, left + right, self.param_ratio or 0.5, min(left, right))
        if isinstance(rank, Skip):
            return rank
        return {"kind": KroneckerLinear.kind, "layer": layer_spec(layer), "rank": rank, "sizes": [m1, n1]}

    def _monarch(self, name: str, layer: nn.Linear) -> dict[str, Any] | Skip:
        m, n = layer.weight.shape
        blocks = self._option("blocks")
        if m % blocks or n % blocks:
            return Skip(name, f"its sizes ({m}, {n}) are no multiples of blocks={blocks}")
        rank = self._rank(name, m * n, blocks * (m + n), self.param_ratio or 0.5, min(m, n) // blocks)
        if isinstance(rank, Skip):
            return rank
        return {"kind": MonarchLinear.kind, "layer": layer_spec(layer), "rank": rank, "blocks": blocks}

    # -- applying ----------------------------------------------------------------------------------------------------

    def fill(self, new: Any, old: Any, plan: LayerPlan, context: CompressionContext) -> None:
        spec = plan.spec
        if spec["kind"] == KroneckerLinear.kind:
            new.set_factors(*math_of.kronecker(old.weight, spec["rank"], tuple(spec["sizes"])))
            return
        if spec["kind"] == MonarchLinear.kind:
            new.set_factors(*math_of.monarch(old.weight, spec["rank"], spec["blocks"]))
            return
        matrix = weight_matrix(old)
        if spec["factorization"] == "nmf":
            new.set_factors(*math_of.semi_nmf(matrix, spec["rank"], self._option("iterations")))
        elif spec["factorization"] == "cur":
            new.set_factors(*math_of.cur(matrix, spec["rank"]))
        else:
            share = (spec["nonzeros"] + 0.5) / matrix.numel()  # half a value more, for the rounding of the quotient
            left, right, sparse = math_of.sparse_plus_low_rank(matrix, spec["rank"], share, self._option("iterations"))
            new.set_factors(left, right)
            weight_of(new.sparse).copy_(sparse.reshape(old.weight.shape))
        if getattr(old, "bias", None) is not None:
            new.second.bias = old.bias  # the same Parameter: ties and optimizer entries stay

    # -- training ----------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, state: dict[str, Any]) -> None:
        self._constrained.pop(model, None)

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        self.project_held(model, state, lambda _: True)

    def project_held(self, model: nn.Module, state: dict[str, Any], held: Callable[[Tensor], bool]) -> None:
        """Nonnegative factors stay nonnegative, and the zeros of sparse parts zero."""
        if model not in self._constrained:
            self._constrained[model] = _constrained_parameters(model)
        with torch.no_grad():
            for parameter, mask in self._constrained[model]:
                if not held(parameter):
                    continue
                if mask is None:
                    parameter.clamp_(min=0)
                else:
                    parameter.mul_(mask)


def _constrained_parameters(model: nn.Module) -> list[tuple[nn.Parameter, Tensor | None]]:
    """Nonnegative parameters, and sparse ones with the places where they are not zero."""
    found: list[tuple[nn.Parameter, Tensor | None]] = []
    for layer in compressed_layers(model).values():
        if "nonzeros" in layer.spec:
            weight = layer.get_submodule("sparse").get_parameter("weight")
            found.append((weight, (weight != 0).to(weight.dtype)))
        elif layer.spec.get("factorization") == "nmf":
            found.append((layer.get_submodule(_nonnegative(layer)).get_parameter("weight"), None))
    return found


def _nonnegative(layer: Any) -> str:
    """Which of the two layers of a semi-nonnegative factorization holds the nonnegative factor."""
    left, right = layer.factors()
    on_the_right = left.shape[-2] >= right.shape[-1]
    transposed = layer.spec["layer"]["type"].startswith("ConvTranspose") or layer.spec["layer"]["type"] == "Embedding"
    return "first" if on_the_right != transposed else "second"


def _lead_here(other: type[LowRankCompression]) -> None:
    """`LowRankCompression(method="factorization", ...)`, as the specification has it, makes a FactorizationCompression.

    In `__init__`, since a `__new__` would hide the options from `inspect` and the command line.
    """
    initialize: Any = other.__init__

    @functools.wraps(initialize)
    def leading(self: Any, config: dict[str, Any] | None = None, /, **options: Any) -> None:
        given = {**(config if isinstance(config, dict) else {}), **options}
        if given.pop("method", None) == "factorization":
            object.__setattr__(self, "__class__", FactorizationCompression)
            FactorizationCompression.__init__(self, **given)
        else:
            initialize(self, config, **options)

    other.__init__ = leading  # type: ignore[method-assign, assignment]


_lead_here(LowRankCompression)
