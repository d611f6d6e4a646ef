"""Schedules: progress of training in [0, 1] to a value."""

import math
from collections.abc import Callable

from pquant_lightning.core.errors import OptionError, known

# shape(t) rises from 0 at t=0 to 1 at t=1
_SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,  # Zhu & Gupta 2017, eq. 1
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "exponential": lambda t: (1 - math.exp(-5 * t)) / (1 - math.exp(-5)),
    "steps": lambda t: min(1.0, math.floor(t * 4 + 1) / 4),  # four equal jumps
}


def scheduled(shape: str, progress: float, target: float, *, start: float = 0.0, end: float = 1.0) -> float:
    """Value at `progress`: 0 before `start`, `target` from `end` on, between them along the shape.

    Args:
        shape: `"constant"`, `"linear"`, `"cubic"`, `"cosine"`, `"exponential"` or `"steps"`.
        progress: share of the training that is done, in [0, 1].
        target: value at the end.
        start: progress at which the value leaves zero.
        end: progress at which the target is reached.

    Raises:
        OptionError: unknown shape, or not 0 <= start <= end <= 1.

    References:
        Cubic: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.

    >>> scheduled("cubic", 0.35, 0.9, start=0.0, end=0.7)
    0.7875
    """
    if shape not in _SHAPES:
        raise OptionError(f"Unknown schedule {shape!r}. {known(shape, _SHAPES)}")
    if not 0 <= start <= end <= 1:
        raise OptionError(f"A schedule needs 0 <= start <= end <= 1, got start={start}, end={end}.")
    if progress < start:
        return 0.0
    if progress >= end:
        return target
    return target * _SHAPES[shape]((progress - start) / (end - start))
