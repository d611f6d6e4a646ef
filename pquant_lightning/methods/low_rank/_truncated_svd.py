"""Truncated singular value decomposition of weight matrices: the cheapest accurate route for each shape and rank.

`torch.linalg.svd` computes every singular vector. Compression keeps a few of them, or all that carry a share of the
energy, so three routes, chosen by shape and rank only, replace it (time / `torch.linalg.svd`, one CPU thread):

* tiny matrices: `torch.linalg.svd` itself;
* small ranks: block Lanczos (0.10 for rank 64 of (768, 768), 0.07 for (768, 3072)), truncation error within 0.3 % of
  the optimum on Gaussian matrices, whose flat spectrum is the hardest, and exact to 1e-4 where the spectrum decays;
* the rest: eigenvectors of the Gram matrix on the smaller side (0.5 and 0.2). Squaring loses singular values below
  3e-4 of the largest in float32, but not the matrix: the other factor is projected from it, not derived from them.
"""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]

_TINY_SIDE = 32
"""Smaller side up to which `torch.linalg.svd` is the cheapest route."""

_LANCZOS_STEPS = 13
"""Blocks in the Krylov basis. With blocks of a quarter of the rank, 13 meet 0.3 % on Gaussian matrices of any size."""

_LANCZOS_MIN_BLOCK = 8
"""Rows of the smallest block: below it, matrix products run at the speed of memory."""

_SUBSPACE_STEPS = 3
"""Power iterations where the Krylov space breaks down."""

_GRAM_PANEL = 128
"""Rows of the Gram matrix per product: only the panels up to the diagonal are computed."""


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the leading singular triplets of a matrix, or of each matrix in a batch.

    Deterministic, and leaves the global random state alone. With `rank` >= min(m, n), `U * S @ Vh` is the matrix up to
    rounding, however ill-conditioned it is. The factor on the smaller side is orthonormal; a vector of the other
    belonging to a zero singular value is zero. Float16 and bfloat16 are computed in float32.

    Args:
        matrix: `(..., m, n)`, floating point.
        rank: number of triplets, r = min(rank, m, n).

    Returns:
        `U (..., m, r)`, `S (..., r)` in descending order and `Vh (..., r, n)`, in float64 for float64, else float32.

    Raises:
        ValueError: `matrix` has fewer than two dimensions, or `rank` is below 1.

    References:
        C. Musco and C. Musco, Randomized block Krylov methods for stronger and faster approximate singular value
        decomposition, NeurIPS 2015, algorithm 2; G. Golub and R. Underwood, The block Lanczos method for computing
        eigenvalues, 1977. We orthogonalise each block against all before it, by CholeskyQR (Y. Yamamoto et al.,
        Roundoff error analysis of the CholeskyQR2 algorithm, ETNA 44, 2015).

    Examples:
        >>> u, s, vh = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
        >>> s
        tensor([3., 2.])
        >>> u.shape, vh.shape
        (torch.Size([3, 2]), torch.Size([2, 3]))
    """
    if rank < 1:
        raise ValueError(f"rank={rank}, but a truncated SVD keeps at least one singular value; pass rank >= 1")
    matrix = _as_computed(matrix)
    if matrix.shape[-2] > matrix.shape[-1]:
        right, values, left = _truncate_wide(matrix.mT, rank)
        return left.mT, values, right.mT
    return _truncate_wide(matrix, rank)


@torch.no_grad()
def truncated_svd_by_energy(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the fewest singular triplets that hold a share of the energy, with a single decomposition.

    The factors are those of `truncated_svd`, the rank is that of `rank_for_energy`; a batch shares one rank.

    Args:
        matrix: `(..., m, n)`, floating point.
        energy: share of the squared Frobenius norm to keep, in (0, 1].

    Returns:
        `U (..., m, r)`, `S (..., r)` in descending order and `Vh (..., r, n)`.

    Raises:
        ValueError: `matrix` has fewer than two dimensions, or `energy` is outside (0, 1].

    Examples:
        >>> u, s, vh = truncated_svd_by_energy(torch.diag(torch.tensor([3.0, 2.0, 1.0])), energy=0.9)
        >>> s  # (9 + 4) / 14 = 0.93
        tensor([3., 2.])
    """
    matrix = _as_computed(matrix)
    if matrix.shape[-2] > matrix.shape[-1]:
        right, values, left = _truncate_wide_by_energy(matrix.mT, energy)
        return left.mT, values, right.mT
    return _truncate_wide_by_energy(matrix, energy)


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Returns all singular values, accurate enough for the energy criterion.

    They are square roots of eigenvalues of the Gram matrix, so in float32 those below about 3e-4 of the largest, which
    hold 1e-7 of its energy, are noise; pass float64 to resolve them.

    Args:
        matrix: `(..., m, n)`, floating point.

    Returns:
        `(..., min(m, n))`, in descending order.

    Raises:
        ValueError: `matrix` has fewer than two dimensions.

    Examples:
        >>> singular_values(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
        tensor([3., 2., 1.])
    """
    matrix = _as_computed(matrix)
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    if wide.shape[-2] <= _TINY_SIDE:
        return torch.linalg.svdvals(wide)
    return torch.linalg.eigvalsh(_gram(wide)).clamp_min(0).sqrt().flip(-1)


def rank_for_energy(singular: Tensor, energy: float) -> int:
    """Returns the smallest rank whose singular values hold a share of the energy.

    The smallest r >= 1 with `sum(s[:r]**2) >= energy * sum(s**2)`; for a batch, the largest over its members.

    Args:
        singular: `(..., k)`, in descending order.
        energy: share of the squared Frobenius norm to keep, in (0, 1].

    Raises:
        ValueError: `energy` is outside (0, 1].

    Examples:
        >>> rank_for_energy(torch.tensor([3.0, 2.0, 1.0]), energy=0.9)  # (9 + 4) / 14 = 0.93
        2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy}, but it is a share of the squared singular values; pass one in (0, 1]")
    cumulative = singular.double().square().cumsum(-1)  # (..., k)
    short = cumulative < energy * cumulative[..., -1:]
    return int(short.sum(-1).max()) + 1


def _as_computed(matrix: Tensor) -> Tensor:
    """Returns the matrix in the precision it is decomposed in."""
    if matrix.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(matrix.shape)} is not a matrix; reshape it to (..., m, n)")
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def _truncate_wide(matrix: Tensor, rank: int) -> Factors:
    """Truncated SVD of a matrix `(..., m, n)` with m <= n."""
    m = matrix.shape[-2]
    rank = min(rank, m)
    block = max(_LANCZOS_MIN_BLOCK, -(-rank // 4))
    if m <= _TINY_SIDE:
        return _cut(torch.linalg.svd(matrix, full_matrices=False), rank)
    if m < 2 * _LANCZOS_STEPS * block:
        vectors = torch.linalg.eigh(_gram(matrix)).eigenvectors[..., -rank:].flip(-1)  # (..., m, r)
        return _normalized(vectors, vectors.mT @ matrix)
    left, rows, failed = _lanczos(matrix, rank, block)
    return _subspace_svd(matrix, rank, _LANCZOS_STEPS * block) if failed.any() else _normalized(left, rows)


def _truncate_wide_by_energy(matrix: Tensor, energy: float) -> tuple[Tensor, Tensor, Tensor]:
    """Truncated SVD by energy of a matrix `(..., m, n)` with m <= n."""
    if matrix.shape[-2] <= _TINY_SIDE:
        factors = torch.linalg.svd(matrix, full_matrices=False)
        return _cut(factors, rank_for_energy(factors.S, energy))
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(matrix))  # ascending
    rank = rank_for_energy(eigenvalues.clamp_min(0).sqrt().flip(-1), energy)
    vectors = eigenvectors[..., -rank:].flip(-1)
    return _normalized(vectors, vectors.mT @ matrix)


def _gram(matrix: Tensor) -> Tensor:
    """Lower triangle of `matrix @ matrix.mT`, `(..., m, m)`, which is all that `eigh` reads."""
    m = matrix.shape[-2]
    gram = matrix.new_empty(*matrix.shape[:-1], m)
    for start in range(0, m, _GRAM_PANEL):
        stop = start + _GRAM_PANEL
        gram[..., start:stop, :stop] = matrix[..., start:stop, :] @ matrix[..., :stop, :].mT
    return gram


def _normalized(left: Tensor, rows: Tensor) -> Factors:
    """Splits `S * Vh`, `(..., r, n)`, into descending values and unit rows; the row of a zero value stays zero."""
    values = torch.linalg.vector_norm(rows, dim=-1)  # (..., r)
    if (values.diff() > 0).any():  # rounding has swapped neighbours
        values, order = values.sort(descending=True)
        left, rows = left.take_along_dim(order.unsqueeze(-2), -1), rows.take_along_dim(order.unsqueeze(-1), -2)
    return left, values, rows.div_(values.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1))


def _cut(factors: Factors, rank: int) -> Factors:
    left, values, right = factors
    return left[..., :rank], values[..., :rank], right[..., :rank, :]


def _lanczos(matrix: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz vectors of a block Krylov space of `matrix @ matrix.mT`.

    Returns:
        `U (..., m, r)`, `U.mT @ matrix (..., r, n)`, and whether that failed `(...)`: the space ended before 13 blocks.
    """
    *batch, m, n = matrix.shape
    dimension = _LANCZOS_STEPS * block
    basis, images = matrix.new_empty(*batch, dimension, m), matrix.new_empty(*batch, dimension, n)
    projected = matrix.new_zeros(*batch, dimension, dimension)  # lower triangle of images @ images.mT
    rows, failed = _orthonormal(_gaussian(matrix, block))
    for start in range(0, dimension, block):
        stop, recent = start + block, slice(max(start - block, 0), start + block)
        basis[..., start:stop, :] = rows
        image = images[..., start:stop, :] = rows @ matrix
        coupling = image @ images[..., recent, :].mT  # (..., block, 2 * block): the triangle is block tridiagonal
        projected[..., start:stop, recent] = coupling
        if stop == dimension:
            break
        scale, info0 = _inverse_cholesky(coupling[..., -block:])
        rows = (scale @ image) @ matrix.mT - (scale @ coupling) @ basis[..., recent, :]
        known = basis[..., :stop, :]
        rows, info2 = _orthonormal(rows - (rows @ known.mT) @ known)
        failed = failed + info0 + info2
    ritz = torch.linalg.eigh(projected).eigenvectors[..., -rank:].flip(-1)  # (..., d, r)
    left = basis.mT @ ritz
    error = (left.mT @ left - torch.eye(rank, dtype=left.dtype, device=left.device)).abs().amax((-2, -1))
    return left, ritz.mT @ images, (failed > 0) | ~(error < 1e-4)


def _subspace_svd(matrix: Tensor, rank: int, dimension: int) -> Factors:
    """Subspace iteration by Householder QR, for what stops Lanczos: most often a rank below the dimension."""
    basis = _gaussian(matrix, dimension).mT
    for _ in range(_SUBSPACE_STEPS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q  # (..., m, d)
    left, values, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return _cut((basis @ left, values, right), rank)


def _gaussian(matrix: Tensor, rows: int) -> Tensor:
    """The same random rows `(..., rows, m)` in every call, on every device."""
    generator = torch.Generator().manual_seed(0)
    rows_ = torch.randn(rows, matrix.shape[-2], generator=generator, dtype=matrix.dtype)
    return rows_.to(matrix.device).expand(*matrix.shape[:-2], -1, -1)


def _orthonormal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """CholeskyQR: orthonormal rows of the same span `(..., b, m)`, and a non-zero `(...)` where that failed."""
    scale, failed = _inverse_cholesky(rows @ rows.mT)
    return scale @ rows, failed


def _inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    lower, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(lower.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False), failed
