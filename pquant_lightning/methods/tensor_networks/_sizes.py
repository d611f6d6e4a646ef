"""Sizes as products of balanced factors; a size that has none is padded to the next one that has."""

import math
from collections.abc import Sequence
from functools import cache


@cache
def balanced_factors(size: int, count: int) -> tuple[int, ...]:
    """`count` factors within a factor of two of each other, ascending; their product is the least one >= `size`.

    Of several such products of the same size, the one whose factors lie closest together.

    Raises:
        ValueError: the size or the count is below 1.

    >>> balanced_factors(1024, 3), balanced_factors(768, 3), balanced_factors(1021, 3)  # a prime: padded by 3
    ((8, 8, 16), (8, 8, 12), (8, 8, 16))
    """
    if size < 1 or count < 1:
        raise ValueError(f"size={size}, count={count}, but a size of at least 1 is split into at least 1 factor.")
    padded = size
    while not (found := _factors(padded, count, low=1, high=padded)):
        padded += 1
    return min(found, key=lambda factors: factors[-1] / factors[0])


def _factors(size: int, count: int, low: int, high: int) -> list[tuple[int, ...]]:
    """Ascending factorizations with all factors in low..high and the last at most twice the first."""
    if count == 1:
        return [(size,)] if low <= size <= high else []
    found = []
    for first in range(low, math.floor(size ** (1 / count) + 1e-9) + 1):
        if size % first == 0:
            limit = min(high, 2 * first)
            found += [(first, *rest) for rest in _factors(size // first, count - 1, first, limit)]
    return found


def matrix_modes(shape: Sequence[int], count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Balanced factors of both sizes of a matrix, ascending and descending; fewer where a pair of them would be 1 x 1.

    In this order, measured on 1024 x 1024, the chain of products is cheapest: the first step shrinks the input most.

    >>> matrix_modes((1024, 1024), 3), matrix_modes((2, 2), 3)
    (((8, 8, 16), (16, 8, 8)), ((1, 2), (2, 1)))
    """
    rows, columns = shape
    while True:
        pair = balanced_factors(rows, count), balanced_factors(columns, count)[::-1]
        if count == 1 or all(row * column > 1 for row, column in zip(*pair, strict=True)):
            return pair
        count -= 1
