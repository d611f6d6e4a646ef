"""Half-quadratic quantization: the grid of a weight without data, for an error that forgives outliers."""

import torch
from torch import Tensor

from pquant_lightning.core.affine import grid_codes, mse_range, mse_scale, pieces

Grids = tuple[Tensor, Tensor | None]  # scale and zero point (channels, groups); None where the grid is symmetric

_BETA, _KAPPA = 10.0, 1.01  # weight of the quadratic term, and its growth per step, as in the paper
_TINY = 1e-8


def half_quadratic(values: Tensor, bits: int, zero_point: bool, power: float = 0.7, steps: int = 20) -> Grids:
    """The grid per block with a small sum of |W - W'|**power, which a few large errors dominate less than a square's.

    It splits the error into a sparse part E, found by a proximal step, and the rest, which moves the grid: with a zero
    point that zero (W - E is matched on average), else the scale (in the least squares sense). The start is the grid of
    the least squared error; the best grid on the way is returned, so that the error never grows.

    Args:
        values: float32 `(channels, groups, values)`.
        bits: 2 to 8.
        zero_point: whether the grid has a zero point. It need not be a whole code, but in blocks that hold exact zeros:
            what has been pruned stays zero.
        power: of the error, in (0, 2].
        steps: at most so many; it ends earlier where no block gets better.

    Returns:
        Scale, and zero point or None, float32 `(channels, groups)`.

    References:
        Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023, equations 3 to 8. We
        differ: the start, the symmetric grid, and that the best step is kept.

    >>> outlier = torch.tensor([[[0.1, 0.2, 0.3, 0.25, 5.0]]])
    >>> scale, zero = half_quadratic(outlier, bits=3, zero_point=True)
    >>> bool(lp_error(outlier, scale, zero, 3) < lp_error(outlier, *mse_range(outlier, 3), 3))
    True
    """
    found = [_solve(part, bits, zero_point, power, steps) for part in pieces(values)]
    scale = torch.cat([scale for scale, _ in found])
    return scale, torch.cat([zero for _, zero in found if zero is not None]) if zero_point else None


def lp_error(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int, power: float = 0.7) -> Tensor:
    """Sum of |W - W'|**power per block, `(channels, groups)`."""
    return (values - _levels(values, scale, zero, bits)[1]).abs_().pow_(power).sum(-1)


def _levels(values: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, and the values they stand for."""
    codes = grid_codes(values, scale, zero, bits)
    shifted = codes if zero is None else codes - zero[..., None]
    return codes, shifted * scale[..., None]


def _solve(values: Tensor, bits: int, zero_point: bool, power: float, steps: int) -> Grids:
    scale, zero = mse_range(values, bits) if zero_point else (mse_scale(values, bits), None)
    best, least = (scale, zero), torch.full_like(scale, torch.inf)
    pruned, low = (values == 0).any(-1), -(2.0 ** (bits - 1))
    beta = _BETA
    for _ in range(steps):
        codes, rounded = _levels(values, scale, zero, bits)
        rest = values - rounded
        magnitude = rest.abs().clamp_min_(_TINY)
        powered = magnitude.pow(power)
        error = powered.sum(-1)
        better = error < least
        if not better.any():
            break
        old_scale, old_zero = best
        best = (
            torch.where(better, scale, old_scale),
            None if zero is None or old_zero is None else torch.where(better, zero, old_zero),
        )
        least = torch.minimum(error, least)
        sparse = magnitude.sub(powered.div_(magnitude), alpha=1 / beta).clamp_min_(0.0).mul_(rest.sign())
        wanted = values - sparse
        if zero is None:
            scale = ((codes * wanted).sum(-1) / codes.square().sum(-1).clamp_min(1.0)).clamp_min(_TINY)
        else:
            zero = (codes - wanted * scale.reciprocal()[..., None]).mean(-1)
            zero = torch.where(pruned, zero.round().clamp(low, -low - 1), zero)
        beta *= _KAPPA
    return best
