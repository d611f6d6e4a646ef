"""Tensor-train decomposition of batches of tensors: TT-SVD on eigenvectors of small Gram matrices.

Every step splits a matrix of which one side is small (a rank times one mode), so that the Gram matrix of that side and
its eigenvectors cost little more than one pass over the data; `torch.linalg.svd`, which TensorLy calls, works on the
long side as well. In float64, squaring leaves singular values down to 1e-8 of the largest.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def tt_svd(tensor: Tensor, ranks: Sequence[int] | None = None, max_error: float = 0.0) -> tuple[list[Tensor], Tensor]:
    """Decomposes each tensor of a batch into a train of cores, all of one batch with the same ranks.

    Args:
        tensor: `(batch, n_1, ..., n_d)`.
        ranks: r_0 to r_d, as `tt_ranks` gives them; None lets `max_error` choose.
        max_error: allowed relative error of each tensor of the batch, in the Frobenius norm, where there are no ranks.
            The guarantee ||T - T'|| <= max_error * ||T|| holds up to rounding.

    Returns:
        d cores `(batch, r_{k-1}, n_k, r_k)` with r_0 = r_d = 1, float64 for float64, otherwise float32, balanced: the
        singular values at each cut are shared evenly between the two sides of it. And the squared error `(batch,)`.

    References:
        I. Oseledets, Tensor-train decomposition, 2011, algorithm 1 and theorem 2.2. We spend what one cut leaves of the
        allowed error on the cuts after it.

    >>> cores, _ = tt_svd(torch.ones(1, 2, 3, 4), max_error=1e-3)
    >>> [tuple(core.shape) for core in cores], round(float(tt_dense(cores).sum()), 4)
    ([(1, 1, 2, 1), (1, 1, 3, 1), (1, 1, 4, 1)], 24.0)
    """
    batch, *modes = tensor.shape
    dtype = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    carry, rank = tensor.double(), 1
    limit = (max_error * torch.linalg.vector_norm(carry.flatten(1), dim=1)).square()  # (batch,), squared error to spend
    error = torch.zeros_like(limit)
    cores: list[Tensor] = []
    values: list[Tensor] = []
    for cut, mode in enumerate(modes[:-1], start=1):
        matrix = carry.reshape(batch, rank * mode, -1)
        if ranks is None:
            u, s, carry, lost = split(matrix, None, (limit - error) / (len(modes) - cut))
        else:
            u, s, carry, lost = split(matrix, ranks[cut])
        error, rank = error + lost, s.shape[-1]
        cores.append(u.reshape(batch, -1, mode, rank))
        values.append(s)
    cores.append(carry.reshape(batch, rank, modes[-1], 1))
    return [core.to(dtype) for core in _balanced(cores, values)], error


def split(matrix: Tensor, max_rank: int | None, allowed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits `(batch, m, n)` into an orthonormal factor `(batch, m, r)` and the rest `(batch, r, n)`.

    Args:
        matrix: float64.
        max_rank: largest r; None for no limit.
        allowed: squared Frobenius error that may be made in each matrix `(batch,)`; r is the least that keeps it.

    Returns:
        The two factors, with the singular values `(batch, r)` after the first, descending, and the squared error
        `(batch,)` last.
    """
    tall = matrix.shape[-2] > matrix.shape[-1]
    energies, vectors = torch.linalg.eigh(matrix.mT @ matrix if tall else matrix @ matrix.mT)  # ascending
    energies = energies.clamp_min(0)
    dropped = energies.cumsum(-1)  # (batch, k): squared error of leaving out that many and one more
    size = energies.shape[-1]
    rank = size if max_rank is None else min(max_rank, size)
    if allowed is not None:
        rank = min(rank, max(1, size - int((dropped <= allowed.unsqueeze(-1)).sum(-1).min())))
    lost = dropped[:, size - rank - 1] if rank < size else torch.zeros_like(dropped[:, 0])
    values, vectors = energies[:, size - rank :].flip(-1).sqrt(), vectors[..., size - rank :].flip(-1)
    if not tall:
        return vectors, values, vectors.mT @ matrix, lost
    inverse = positive(values).reciprocal()
    return (matrix @ vectors) * inverse.unsqueeze(-2), values, values.unsqueeze(-1) * vectors.mT, lost


def positive(values: Tensor) -> Tensor:
    """Singular values that may be divided by: none below 1e-12 of the largest."""
    return values.clamp_min(1e-12 * float(values.amax())).clamp_min(1e-100)


def _balanced(cores: list[Tensor], values: list[Tensor]) -> list[Tensor]:
    """Moves the square root of the singular values of each cut to its left side: halves of one scale train well."""
    for cut, singular in enumerate(values):
        root = positive(singular).sqrt()
        cores[cut] = cores[cut] * root[:, None, None, :]
        cores[cut + 1] = cores[cut + 1] / root[:, :, None, None]
    return cores


def tt_dense(cores: list[Tensor]) -> Tensor:
    """The tensors `(batch, n_1, ..., n_d)` that trains of cores stand for, by pairwise products."""
    batch, modes = cores[0].shape[0], [core.shape[2] for core in cores]
    dense = cores[0].reshape(batch, modes[0], -1)
    for core in cores[1:]:
        dense = (dense @ core.flatten(2)).reshape(batch, -1, core.shape[-1])
    return dense.reshape(batch, *modes)


def tt_ranks(modes: Sequence[int], max_rank: int) -> list[int]:
    """The d + 1 ranks of a train under a limit: none exceeds what the modes on either side of its cut allow.

    >>> tt_ranks([4, 5, 6], max_rank=5)
    [1, 4, 5, 1]
    """
    ranks = [1]
    for cut, mode in enumerate(modes[:-1], start=1):
        right = 1
        for later in modes[cut:]:
            right *= later
        ranks.append(min(max_rank, ranks[-1] * mode, right))
    return [*ranks, 1]
