"""Low-rank factors of least output error: reduced-rank regression on the moments of a layer's inputs.

For outputs y = W x and the second moment C = E[x x^T] = S S^T, the weight W' of rank r with the least
E ||W x - W' x||^2 is U U^T W, where U holds the leading left singular vectors of W S (SVD-LLM writes the same as
U S V S^-1). Written as a projection of the outputs nothing is divided by S, so that a singular moment is no special
case; a little of the identity is added to it all the same, so that directions that the samples do not show are kept as
well as the rest of the rank allows.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import weight_of
from pquant_lightning.core.moments import (
    InputMoments,
    column_moment,
    covariance,
    damped_root,
    energy,
    mean_shift,
)
from pquant_lightning.methods.low_rank import _truncated_svd
from pquant_lightning.methods.low_rank._layers import (
    Kind,
    TruncatedSVDConvTranspose,
    TruncatedSVDSpatialConv,
    weight_matrix,
)
from pquant_lightning.methods.low_rank._truncated_svd import Factors

REGRESSION_DAMPING = 0.1
"""Damping where a weight is corrected for changed inputs: that fits many more numbers to the same samples."""


class Fit(NamedTuple):
    """What stands for a weight.

    Attributes:
        factors: U (groups, m, r), S (groups, r), Vh (groups, r, n): their product is the new weight.
        shift: what is added to the bias, (groups * outputs,); None where the bias stays.
        loss: E ||y - y'||^2 / E ||y - E y||^2 over the samples (without the mean where the bias stays).
    """

    factors: Factors
    shift: Tensor | None
    loss: float


def projected(matrix: Tensor, root: Tensor, rank: int) -> tuple[Factors, float]:
    """The weight U U^T W of rank r with the least error in the norm of W S, as a balanced product, and that error.

    Args:
        matrix: W `(groups, m, n)`.
        root: S `(groups, n, n)`.
        rank: r.

    Returns:
        Its singular value decomposition, and ||(W - W') S||^2 / ||W S||^2.
    """
    if rank >= min(matrix.shape[1:]):
        return _truncated_svd.truncated_svd(matrix, rank), 0.0
    scaled = matrix @ root.to(matrix.dtype)
    left, values, _ = _truncated_svd.truncated_svd(scaled, rank)
    lost = 1 - float(values.double().square().sum() / scaled.double().square().sum().clamp_min(1e-300))
    # for m > n the columns of vanishing values are rough, or zero: QR completes the basis
    left = torch.linalg.qr(left * values.unsqueeze(-2)).Q
    u, s, vh = _truncated_svd.truncated_svd(left.mT @ matrix, rank)
    return (left @ u, s, vh), max(lost, 0.0)


def as_product(left: Tensor, right: Tensor) -> Factors:
    """The singular value decomposition of `left @ right`, `(groups, m, r)` and `(groups, r, n)`, from its factors."""
    basis, upper = torch.linalg.qr(left)
    u, s, vh = _truncated_svd.truncated_svd(upper @ right, left.shape[-1])
    return basis @ u, s, vh


def regressed(matrix: Tensor, moments: InputMoments, centred: bool) -> Tensor:
    """The weight that best gives, from the inputs x as they are now, what W gave from the inputs x' of the reference.

    W + W E[(x' - x) x^T] (C + damping)^-1, `(groups, m, n)`; W itself where the inputs have not changed.
    """
    cross = moments.cross_covariance if centred else moments.cross
    if cross is None:
        return matrix
    root = damped_root(covariance(moments, centred).double(), REGRESSION_DAMPING)
    if root is None:
        return matrix
    change = torch.cholesky_solve((matrix.double() @ cross.double()).mT, root).mT
    return (matrix.double() + change).to(matrix.dtype)


def across_products(rows: Tensor, keep: Tensor, moment: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Moments of the signals z that the second of two one-directional convolutions sees.

    Args:
        rows: W `(groups, out, in * h * w)`.
        keep: what the first convolution keeps, `(groups, r, in * h)`.
        moment: C `(groups, in * h * w, in * h * w)`.
        width: w.

    Returns:
        E[z z^T] `(groups, r, w, r, w)` and E[y z^T] `(groups, out, r, w)` with y = W x.
    """
    groups, _, n = keep.shape
    windows = moment.reshape(groups, n, width, n, width)
    half = torch.einsum("grp,gpbqc->grbqc", keep, windows)
    outputs = (rows @ moment).reshape(groups, -1, n, width)
    return torch.einsum("grbqc,gsq->grbsc", half, keep), torch.einsum("goqc,gsq->gosc", outputs, keep)


def refit_across(rows: Tensor, factors: Factors, moment: Tensor, width: int) -> Factors:
    """The second of two one-directional convolutions, fitted anew by least squares to the outputs of W.

    Args:
        rows: W `(groups, out, in * h * w)`.
        factors: of the (out * w) x (in * h) matrices; Vh is what the first convolution keeps.
        moment: C `(groups, in * h * w, in * h * w)`.
        width: w.
    """
    u, s, vh = factors
    groups, rank, _ = vh.shape
    out, size = rows.shape[1], rank * width
    seen, wanted = across_products(rows, vh, moment, width)
    seen, wanted = seen.reshape(groups, size, size), wanted.reshape(groups, out, size)
    left = (u * s.unsqueeze(-2)).reshape(groups, out, width, rank).transpose(2, 3).reshape(groups, out, size)
    root = damped_root(seen)
    if root is None:
        return factors
    left = left + torch.cholesky_solve((wanted - left @ seen).mT, root).mT
    return as_product(left.reshape(groups, out, rank, width).transpose(2, 3).reshape(u.shape), vh)


def across_losses(rows: Tensor, factors: Factors, moment: Tensor, width: int) -> Tensor:
    """E ||y - y'||^2 / E ||y||^2 of two one-directional convolutions at each rank 1..r, `(r,)`, before the refit.

    The parts of the singular directions add up: the error of the first k is a sum over their inner products.
    """
    u, s, vh = factors
    groups, rank, _ = vh.shape
    left = (u * s.unsqueeze(-2)).reshape(groups, -1, width, rank)
    seen, wanted = across_products(rows, vh, moment, width)
    inner = torch.einsum("gobr,gocs,grbsc->rs", left, left, seen).double()
    along = torch.einsum("gobr,gorb->r", left, wanted).double()
    total = energy(rows, moment)
    losses = total - 2 * along.cumsum(0) + inner.cumsum(0).cumsum(1).diagonal()
    return (losses / max(total, 1e-300)).clamp(0, 1)


def fit_rows(rows: Tensor, moments: InputMoments, rank: int, centred: bool) -> tuple[Factors, float]:
    """Factors for a weight `(groups, m, n)` whose inputs have these moments, and their error (see `projected`)."""
    wanted = regressed(rows, moments, centred)
    root = damped_root(covariance(moments, centred))
    return (_truncated_svd.truncated_svd(wanted, rank), 0.0) if root is None else projected(wanted, root, rank)


def fit(layer: nn.Module, kind: Kind, rank: int, moments: InputMoments) -> Fit:
    """The best factors of that rank for a layer whose inputs have these moments.

    Where the layer has a bias, it takes the mean error of the outputs, and the factors what varies. A transposed
    convolution is fitted as if the outputs of neighbouring positions did not overlap.

    Args:
        layer: Linear, Conv or ConvTranspose.
        kind: how it is split.
        rank: per group, at most the smaller side of the matrix.
        moments: of its inputs.
    """
    weight = weight_of(layer).detach()
    weight = weight if weight.dtype == torch.float64 else weight.float()
    groups, bias = int(getattr(layer, "groups", 1)), getattr(layer, "bias", None)
    if kind is TruncatedSVDConvTranspose:
        (u, s, vh), loss = fit_rows(kind.to_matrix(weight, groups).mT, moments, rank, centred=False)
        return Fit((vh.mT, s, u.mT), None, loss)
    rows = weight.reshape(groups, weight.shape[0] // groups, -1)
    if kind is TruncatedSVDSpatialConv:
        factors, loss = _fit_spatial(rows, weight.shape, moments, rank, bias is not None)
    else:
        factors, loss = fit_rows(rows, moments, rank, bias is not None)
    if bias is None:
        return Fit(factors, None, loss)
    u, s, vh = factors
    after = kind.from_matrix((u * s.unsqueeze(-2)) @ vh, tuple(weight.shape[2:])).reshape(rows.shape)
    return Fit(factors, mean_shift(rows, after, moments), loss)


def _fit_spatial(
    rows: Tensor, shape: torch.Size, moments: InputMoments, rank: int, centred: bool
) -> tuple[Factors, float]:
    kind, groups, width = TruncatedSVDSpatialConv, len(rows), shape[-1]
    wanted, moment = regressed(rows, moments, centred), covariance(moments, centred).to(rows.dtype)
    matrix = kind.to_matrix(wanted.reshape(shape), groups)
    root = damped_root(column_moment(moment, width))
    if root is None:
        return _truncated_svd.truncated_svd(matrix, rank), 0.0
    factors, _ = projected(matrix, root, rank)
    if rank < min(matrix.shape[1:]):
        factors = refit_across(wanted, factors, moment, width)
    u, s, vh = factors
    after = kind.from_matrix((u * s.unsqueeze(-2)) @ vh, tuple(shape[2:])).reshape(rows.shape)
    return factors, energy(wanted - after, moment) / max(energy(wanted, moment), 1e-300)


def fit_layer(layer: nn.Module, kind: Kind, rank: int, moments: InputMoments | None) -> Fit:
    """The factors of a layer: of the least error of its outputs where its inputs are known, else of its weight."""
    if moments is not None:
        return fit(layer, kind, rank, moments)
    matrix = weight_matrix(layer, kind).detach()
    factors = _truncated_svd.truncated_svd(matrix, rank)
    return Fit(factors, None, lost_share(matrix, factors[1]))


def lost_share(matrix: Tensor, kept: Tensor) -> float:
    """Of the squared norm of matrices, what their singular values `kept` do not hold."""
    norm = torch.linalg.vector_norm(matrix.float()).clamp_min(1e-30)
    return max(float(1 - (torch.linalg.vector_norm(kept.float()) / norm) ** 2), 0.0)
