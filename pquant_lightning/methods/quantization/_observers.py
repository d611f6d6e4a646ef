"""From what calibration has measured of a layer's inputs to the range that their codes cover."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from pquant_lightning.core.affine import affine_codes, affine_scale
from pquant_lightning.core.calibration import InputStatistics

Observer = Literal["histogram", "minmax", "moving_average", "percentile", "mse", "entropy"]
Range = tuple[float, float]

PERCENTILE = 99.999
_SHARES = torch.linspace(0.04, 1.0, 25, dtype=torch.float32)  # of the way from zero to an extreme


def choose_range(found: InputStatistics, observer: Observer, bits: int) -> Range:
    """Minimum and maximum of the codes' range, chosen from the statistics of a layer's inputs."""
    if found.minimum == found.maximum:
        return found.minimum, found.maximum
    return _OBSERVERS[observer](found, bits)


def _minmax(found: InputStatistics, bits: int) -> Range:
    return found.minimum, found.maximum


def _moving_average(found: InputStatistics, bits: int) -> Range:
    return found.moving


def _percentile(found: InputStatistics, bits: int) -> Range:
    """Values between the (100 - p)-th and the p-th percentile, p = 99.999."""
    reached = found.histogram.double().cumsum(0) / found.histogram.double().sum()
    rest = 1 - PERCENTILE / 100
    low = int((reached <= rest).sum())
    high = int((reached < 1 - rest).sum())
    width = (found.maximum - found.minimum) / len(reached)
    return found.minimum + low * width, found.minimum + (high + 1) * width


def _mse(found: InputStatistics, bits: int) -> Range:
    """Both extremes shrunk by one factor, for the least squared error (Choukroun et al. 2019)."""
    low, high = found.minimum * _SHARES, found.maximum * _SHARES
    best = int(_errors(found, low, high, bits).argmin())
    return float(low[best]), float(high[best])


def _histogram(found: InputStatistics, bits: int) -> Range:
    """Each extreme shrunk by a factor of its own, for the least squared error (as torch's HistogramObserver)."""
    low, high = (
        grid.flatten() for grid in torch.meshgrid(found.minimum * _SHARES, found.maximum * _SHARES, indexing="ij")
    )
    best = int(_errors(found, low, high, bits).argmin())
    return float(low[best]), float(high[best])


def _errors(found: InputStatistics, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Summed squared error of rounding the histogram's values, for each candidate range."""
    counts, centers = _bins(found, 512)
    scale, zero_point = (values[:, None] for values in affine_scale(low, high, bits))
    rounded = (affine_codes(centers, scale.reciprocal(), zero_point, 2**bits - 1) - zero_point) * scale
    return (rounded - centers).square() @ counts


def _bins(found: InputStatistics, count: int) -> tuple[Tensor, Tensor]:
    """The histogram in `count` equal bins, and their centers."""
    counts = found.histogram.unflatten(0, (count, -1)).sum(1)
    width = (found.maximum - found.minimum) / count
    return counts, found.minimum + (torch.arange(count, dtype=torch.float32) + 0.5) * width


def _entropy(found: InputStatistics, bits: int) -> Range:
    """Both extremes shrunk by one factor, for the least Kullback-Leibler divergence between the values' distribution,
    clipped, and its version in 2**bits levels (Migacz, "8-bit Inference with TensorRT", 2017).

    As there, zeros do not count: they are exact in any range, and behind a ReLU half of all values.
    """
    counts, centers = _bins(found, len(found.histogram))
    counts = counts.where((centers - centers[centers.abs().argmin()]).abs() > 0, 0.0)
    best, least = (found.minimum, found.maximum), torch.inf
    for share in _SHARES.tolist():
        low, high = found.minimum * share, found.maximum * share
        scale, zero_point = affine_scale(torch.tensor(low), torch.tensor(high), bits)
        inside = (centers >= low) & (centers <= high)
        if not counts[inside].any():
            continue
        clipped = counts.where(inside, 0.0)
        kept = inside.nonzero()
        clipped[kept[0]] += counts[centers < low].sum()
        clipped[kept[-1]] += counts[centers > high].sum()
        level = affine_codes(centers, scale.reciprocal(), zero_point, 2**bits - 1).long()
        used = (inside & (counts > 0)).float()
        mass = torch.zeros(2**bits, dtype=torch.float32).index_add_(0, level, counts.where(inside, 0.0))
        places = torch.zeros(2**bits, dtype=torch.float32).index_add_(0, level, used)
        spread = (mass / places.clamp_min(1))[level] * used
        p, q = clipped / clipped.sum(), spread / spread.sum()
        divergence = float((p * (p / q.clamp_min(1e-12)).clamp_min(1e-12).log()).sum())
        if divergence < least:
            best, least = (low, high), divergence
    return best


_OBSERVERS: dict[Observer, Callable[[InputStatistics, int], Range]] = {
    "histogram": _histogram,
    "minmax": _minmax,
    "moving_average": _moving_average,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}
