"""What can become of one layer: its rank by each criterion, and what every rank would cost and lose."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.moments import InputMoments, column_moment, covariance, damped_root
from pquant_lightning.core.plan import Candidate
from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank._fitting import (
    Fit,
    across_losses,
    fit_layer,
    lost_share,
)
from pquant_lightning.methods.low_rank._layers import (
    Kind,
    TruncatedSVDConvTranspose,
    TruncatedSVDSpatialConv,
    weight_matrix,
)
from pquant_lightning.methods.low_rank._ranks import evbmf_rank

_STEPS = 128  # ranks that are offered to a budget, evenly up to the size of the dense layer: steps of 1 % or one rank


class Choice(NamedTuple):
    """One way to factorize a layer.

    Attributes:
        kind: how it is split.
        rank: per group.
        params: numbers in both factors.
        loss: squared relative error; 0 where it was not needed.
        fit: the factors, where they are known already.
    """

    kind: Kind
    rank: int
    params: int
    loss: float
    fit: Fit | None


def choose(
    layer: nn.Module, kind: Kind, target: str, value: Any, round_to: int, moments: InputMoments | None, compared: bool
) -> Choice | str:
    """The rank that a criterion gives a layer that is split in this way; or why there is none.

    Args:
        layer: an ordinary layer.
        kind: how it is split.
        target: "rank", "energy" or "param_ratio".
        value: of the target.
        round_to: the rank is a multiple of this, if it is found.
        moments: of the layer's inputs, where they are known.
        compared: with other ways; then the loss is needed.
    """
    matrix = weight_matrix(layer, kind).detach()
    groups, m, n = matrix.shape
    found: Fit | None = None
    if target == "param_ratio":
        rank = int(value * matrix.numel() / (groups * (m + n))) // round_to * round_to
        if rank < 1:
            return f"even rank {round_to} keeps more than {value:.0%} of its weights"
    elif target == "energy" and moments is None:
        factors = _truncated_svd.truncated_svd_by_energy(matrix, value)
        found, rank = Fit(factors, None, lost_share(matrix, factors[1])), factors[1].shape[-1]
    elif target == "energy":
        lost = losses(layer, kind, matrix, moments)
        rank = int((lost > 1 - value).sum()) + 1
    elif value == "evbmf":
        rank = max(evbmf_rank(values, m, n) for values in _truncated_svd.singular_values(matrix))
        if rank < 1:
            return "EVBMF finds no signal above the noise in its weight"
    else:
        rank = int(value)
    if target == "energy" or value == "evbmf":
        rank = -(-rank // round_to) * round_to
    rank = min(rank, m, n)
    if found is not None and found.factors[1].shape[-1] != rank:
        found = None
    if compared and found is None:
        found = fit_layer(layer, kind, rank, moments)
    return Choice(kind, rank, groups * rank * (m + n), 0.0 if found is None else found.loss, found)


def losses(layer: nn.Module, kind: Kind, matrix: Tensor, moments: InputMoments | None) -> Tensor:
    """Squared relative error at each rank 1, 2, ... `(min(m, n),)`: of the outputs where there are moments."""
    if moments is None:
        return _tail(_truncated_svd.singular_values(matrix))
    if kind is TruncatedSVDConvTranspose:
        matrix, moment = matrix.mT, covariance(moments, False)
    else:
        moment = covariance(moments, getattr(layer, "bias", None) is not None)
    moment = moment.to(matrix.dtype if matrix.dtype == torch.float64 else torch.float32)
    width = weight_of(layer).shape[-1] if kind is TruncatedSVDSpatialConv else 0
    root = damped_root(column_moment(moment, width) if width else moment)
    if root is None:
        return _tail(_truncated_svd.singular_values(matrix))
    scaled = matrix.to(root.dtype) @ root
    if not width:
        return _tail(_truncated_svd.singular_values(scaled))
    u = _truncated_svd.truncated_svd(scaled, min(scaled.shape[1:]))[0]
    right = u.mT @ matrix.to(root.dtype)
    rows = weight_of(layer).detach().to(root.dtype).reshape(len(matrix), -1, moment.shape[-1])
    return across_losses(rows, (u, right.new_ones(right.shape[:2]), right), moment, width)


def _tail(singular: Tensor) -> Tensor:
    """The share of the squared norm below each rank, over all groups."""
    squares = singular.double().square()
    return (1 - squares.cumsum(-1).sum(0) / squares.sum().clamp_min(1e-300)).clamp(0, 1)


def offers(layer: nn.Module, kind: Kind, round_to: int, moments: InputMoments | None) -> list[Candidate]:
    """What a budget may choose among for one layer that is split in this way, smallest first."""
    matrix = weight_matrix(layer, kind).detach()
    groups, m, n = matrix.shape
    top = matrix.numel() // (groups * (m + n))
    lost = losses(layer, kind, matrix, moments)
    ranks = {max(1, round(top * step / _STEPS)) // round_to * round_to for step in range(1, _STEPS + 1)}
    return [
        Candidate(
            {"rank": rank, "kind": kind.kind},
            groups * rank * (m + n) * matrix.element_size(),
            macs_per_position(layer, kind, rank),
            float(lost[rank - 1]),
            factors=2,
        )
        for rank in sorted(ranks & set(range(1, min(m, n) + 1)))
    ]


def macs_per_position(layer: nn.Module, kind: Kind | None, rank: int) -> int:
    """Multiply-accumulates per output position (input position of a transposed convolution); kind None is dense."""
    if kind is None:
        return 0 if isinstance(layer, nn.Embedding) else weight_of(layer).numel()
    groups, m, n = weight_matrix(layer, kind).shape
    if isinstance(layer, nn.Embedding):
        return rank * n
    stride = layer.stride[1] if isinstance(layer, nn.Conv2d) and kind is TruncatedSVDSpatialConv else 1
    return groups * rank * (m + n * stride)


def why_slower(layer: nn.Module, kind: Kind, rank: int) -> str | None:
    """Why a layer that would get smaller would not get faster; None where it would (lookups are not compared)."""
    before, after = macs_per_position(layer, None, 1), macs_per_position(layer, kind, rank)
    groups, m, n = weight_matrix(layer, kind).shape
    smaller = groups * rank * (m + n) < weight_of(layer).numel()
    if isinstance(layer, nn.Embedding) or not smaller or after < before:
        return None
    return f"would take {after:,} multiply-accumulates per position instead of {before:,}"
