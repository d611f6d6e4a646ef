"""Which scores are the smallest: exactly, over many tensors at once, without a second copy of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pquant_lightning.core.errors import ModelError

_CHUNK = 1 << 17  # values per pass over memory: what the cache holds
_SAMPLES = 1 << 18  # values that a bracket around the threshold is read from
LEAST_DENSITY = 0.1
"""A layer keeps at least this share of the average density, so that none is emptied."""


def most_dropped(share: float, count: int) -> int:
    """How many of `count` values go where that share is asked for: at least one stays."""
    return min(round(share * count), int((1 - LEAST_DENSITY * (1 - share)) * count))


def check_finite(name: str, criterion: str, scores: Tensor) -> None:
    """Refuses scores that cannot be ranked.

    Raises:
        ModelError: one is NaN or infinite.
    """
    if scores.numel() and not torch.stack(torch.aminmax(scores)).isfinite().all():
        raise ModelError(
            f"The scores of {name!r} by criterion={criterion!r} hold NaN or infinite values, so that nothing can be "
            "ranked: its weights, or the data that they were scored on, do. Look at the data and at the learning rate, "
            "start from finite weights, or leave the layer out with exclude."
        )


def keep_largest(scores: Sequence[Tensor], drop: int, absolute: bool = False) -> list[Tensor]:
    """Masks, True where a value stays, that drop exactly `drop` values of all tensors together: the smallest ones.

    Of equal values the first are dropped.

    Args:
        scores: tensors of any shapes, at least `drop` values in all.
        drop: how many to drop.
        absolute: compare magnitudes; the scores are then not copied.
    """
    if drop == 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    threshold, ties = kth_smallest(scores, drop, absolute)
    masks = []
    for score in scores:
        values = score.abs() if absolute else score
        mask = values > threshold
        if ties > 0:  # some values at the threshold stay
            equal = values == threshold
            order = equal.flatten().cumsum(0).reshape(equal.shape)
            mask |= equal & (order > ties)
            ties -= min(ties, int(order.flatten()[-1])) if order.numel() else 0
        elif ties == 0:
            mask |= values == threshold
        masks.append(mask)
    return masks


def kth_smallest(scores: Sequence[Tensor], k: int, absolute: bool = False) -> tuple[float, int]:
    """The k-th smallest value of all tensors (1 is the smallest), and how many values equal to it are among the k.

    A bracket that almost surely holds it is read from a random sample; one pass counts what lies below and collects
    what lies inside, which is little. Where the bracket misses, everything is sorted.
    """
    total = sum(score.numel() for score in scores)
    low, high = -torch.inf, torch.inf
    if total > 4 * _SAMPLES:
        low, high = _bracket(scores, k, total, absolute)
    below, inside = 0, []
    for values in _chunks(scores, absolute):
        if low == -torch.inf and high == torch.inf:
            inside.append(values.clone())
            continue
        at_least = values >= low
        below += values.numel() - int(torch.count_nonzero(at_least))
        inside.append(values[at_least.logical_and_(values <= high)])
    found = torch.cat(inside)
    if not below < k <= below + found.numel():
        found, below = torch.cat([values.clone() for values in _chunks(scores, absolute)]), 0
    value = found.kthvalue(k - below).values
    return float(value), k - below - int(torch.count_nonzero(found < value))


def _bracket(scores: Sequence[Tensor], k: int, total: int, absolute: bool) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for score in scores:
        count = -(-score.numel() * _SAMPLES // total)
        places = torch.randint(score.numel(), (count,), generator=generator)
        drawn.append(score.flatten()[places.to(score.device)].float())
    sample = torch.cat(drawn).abs_() if absolute else torch.cat(drawn)
    share, size = k / total, sample.numel()
    spread = 6 * (share * (1 - share) / size) ** 0.5 + 4 / size
    first, last = (int(size * (share + sign * spread)) for sign in (-1, 1))
    ordered = sample.sort().values
    low = float(ordered[first]) if first > 0 else -torch.inf
    high = float(ordered[last]) if last < size else torch.inf
    return low, high


def _chunks(scores: Sequence[Tensor], absolute: bool) -> Iterator[Tensor]:
    """Float values, a cache-sized piece at a time, valid until the next is asked for."""
    for score in scores:
        flat = score.detach().flatten()
        size = flat.numel() if flat.is_cuda else _CHUNK
        for start in range(0, flat.numel(), max(size, 1)):
            piece = flat[start : start + size]
            yield piece.abs() if absolute else piece


def keep_largest_in_rows(scores: Tensor, drop: int) -> Tensor:
    """A mask of the shape `(rows, values)` of the scores that drops the `drop` smallest values of each row."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(drop, dim=1, largest=False).indices, False) if drop else mask
