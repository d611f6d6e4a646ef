"""Truncated singular value decomposition of weights: the cheapest accurate route for each shape and rank.

Compression needs a few singular triplets, or all that hold a share of the energy. Instead of `torch.linalg.svd`, which
finds all, one of three routes is taken, by shape and rank only; in brackets its time relative to `torch.linalg.svd` for
(768, 768) and (768, 3072), one CPU thread, as measured by `examples/benchmarks/factorization.py`:

* smaller side up to 32: `torch.linalg.svd` itself;
* small ranks: block Lanczos (0.10 and 0.07 at rank 64). The truncation error is within 0.3 % of the optimum for
  Gaussian matrices, whose flat spectrum is a hard one, and within 0.001 % for singular values that fall like i^-0.5;
* other ranks: eigenvectors of the Gram matrix of the smaller side (0.5 and 0.2). In float32, squaring blurs singular
  values below 3e-4 of the largest; nothing of the matrix is lost, as the other factor is projected from itself.
"""

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, Tensor]

_TINY_SIDE = 32
_GRAM_PANEL = 128  # rows per product: only blocks up to the diagonal are computed, and wide products are fast
_LANCZOS_BLOCKS = 13  # with blocks of a quarter of the rank, the fewest within 0.3 % on Gaussian matrices of any size
_LANCZOS_MIN_BLOCK = 8  # narrower products run at the speed of memory
_SUBSPACE_STEPS = 3
_OVERSAMPLING = 8  # Halko et al., section 1.3


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> Factors:
    """Returns the leading singular triplets of a matrix, or of each matrix in a batch.

    Deterministic, and leaves the global random state alone. For `rank` >= min(m, n), `U * S @ Vh` is the matrix up to
    rounding, however ill-conditioned it is. The factor of the smaller side is orthonormal. In the other, vectors of
    singular values below 3e-4 of the largest are of unit length but only roughly orthogonal, or zero for a zero value.

    Args:
        matrix: `(..., m, n)`, floating point.
        rank: number of triplets; r = min(rank, m, n) are returned.

    Returns:
        `U (..., m, r)`, `S (..., r)` in descending order, `Vh (..., r, n)`; float64 for float64, otherwise float32.

    Raises:
        ValueError: `matrix` has fewer than two dimensions or a value that is not finite, or `rank` is below 1.

    References:
        C. Musco and C. Musco, Randomized block Krylov methods for stronger and faster approximate singular value
        decomposition, 2015, algorithm 2; we run it as block Lanczos, orthogonalizing each block against all before it
        by CholeskyQR. Where the Krylov space breaks down: N. Halko, P. Martinsson and J. Tropp, Finding structure with
        randomness, 2011, algorithm 4.4.

    >>> u, s, vh = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=2)
    >>> s, u.shape, vh.shape
    (tensor([3., 2.]), torch.Size([3, 2]), torch.Size([2, 3]))
    """
    if rank < 1:
        raise ValueError(f"rank={rank}, but a truncated SVD keeps at least one singular value; pass rank >= 1.")
    wide, transposed = _as_wide(matrix)
    return _turned(_truncate(wide, min(rank, wide.shape[-2])), transposed)


@torch.no_grad()
def truncated_svd_by_energy(matrix: Tensor, energy: float) -> Factors:
    """Returns the fewest singular triplets that hold a share of the energy, by a single decomposition.

    Args and returned factors are as in `truncated_svd`, the rank as in `rank_for_energy`; a batch shares one rank.

    Raises:
        ValueError: `matrix` has fewer than two dimensions or a value that is not finite, or `energy` is not in (0, 1].

    >>> truncated_svd_by_energy(torch.diag(torch.tensor([3.0, 2.0, 1.0])), energy=0.9)[1]  # (9 + 4) / 14 = 0.93
    tensor([3., 2.])
    """
    wide, transposed = _as_wide(matrix)
    if wide.shape[-2] <= _TINY_SIDE:
        factors = torch.linalg.svd(wide, full_matrices=False)
        return _turned(_cut(factors, rank_for_energy(factors.S, energy)), transposed)
    eigenvalues, eigenvectors = torch.linalg.eigh(_gram(wide))  # ascending
    rank = rank_for_energy(eigenvalues.clamp_min(0).sqrt().flip(-1), energy)
    return _turned(_projected(wide, eigenvectors[..., -rank:].flip(-1)), transposed)


@torch.no_grad()
def singular_values(matrix: Tensor) -> Tensor:
    """Returns all singular values `(..., min(m, n))` of `(..., m, n)`, descending, as the energy criterion needs them.

    They are square roots of eigenvalues of the Gram matrix: in float32 those below 3e-4 of the largest, which hold 1e-7
    of its energy each, are noise. Pass float64 to resolve them.

    Raises:
        ValueError: `matrix` has fewer than two dimensions or a value that is not finite.

    >>> singular_values(torch.diag(torch.tensor([1.0, 3.0, 2.0])))
    tensor([3., 2., 1.])
    """
    wide, _ = _as_wide(matrix)
    tiny = wide.shape[-2] <= _TINY_SIDE
    values: Tensor = torch.linalg.svdvals(wide) if tiny else torch.linalg.eigvalsh(_gram(wide)).clamp_min(0).sqrt()
    return values if tiny else values.flip(-1)


@torch.no_grad()
def truncation_error_bound(matrix: Tensor, rank: int) -> float:
    """An upper bound of ||W - W_k|| / ||W||, from one random projection: close where the singular values fall.

    Args:
        matrix: `(..., m, n)`; of a batch, the error of all together.
        rank: k.

    References:
        N. Halko, P. Martinsson and J. Tropp, Finding structure with randomness, 2011, algorithm 4.1.

    >>> truncation_error_bound(torch.ones(20, 30), 1) < 1e-3
    True
    """
    wide, _ = _as_wide(matrix)
    size = min(rank + _OVERSAMPLING, wide.shape[-2])
    rows = torch.linalg.qr(wide @ _gaussian(wide.mT, size)).Q.mT @ wide  # (..., size, n)
    kept = torch.linalg.eigvalsh(rows @ rows.mT)[..., -rank:].clamp_min(0).sum()
    return float((1 - kept / wide.square().sum().clamp_min(1e-30)).clamp_min(0).sqrt())


def rank_for_energy(singular: Tensor, energy: float) -> int:
    """Returns the smallest r >= 1 with `sum(s[:r]**2) >= energy * sum(s**2)`; for a batch, the largest of its members'.

    Args:
        singular: `(..., k)`, in descending order.
        energy: share of the squared Frobenius norm to keep, in (0, 1].

    Raises:
        ValueError: `energy` is not in (0, 1].

    >>> rank_for_energy(torch.tensor([3.0, 2.0, 1.0]), energy=0.9)  # (9 + 4) / 14 = 0.93
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy}, but it is the share of the squared norm to keep; pass one in (0, 1].")
    held = singular.double().square().cumsum(-1)  # (..., k)
    return int((held < energy * held[..., -1:]).sum(-1).max()) + 1


def _as_wide(matrix: Tensor) -> tuple[Tensor, bool]:
    """The matrix in the precision it is decomposed in, transposed where that makes m <= n, and whether it is."""
    if matrix.ndim < 2:
        raise ValueError(f"a tensor of shape {tuple(matrix.shape)} is no matrix; reshape it to (..., m, n).")
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    if not matrix.sum().isfinite():
        raise ValueError(f"a matrix of shape {tuple(matrix.shape)} holds NaN or infinite values; repair the weights.")
    transposed = matrix.shape[-2] > matrix.shape[-1]
    return matrix.mT if transposed else matrix, transposed


def _turned(factors: Factors, transposed: bool) -> Factors:
    left, values, right = factors
    return (right.mT, values, left.mT) if transposed else (left, values, right)


def _cut(factors: Factors, rank: int) -> Factors:
    left, values, right = factors
    return left[..., :rank], values[..., :rank], right[..., :rank, :]


def _truncate(wide: Tensor, rank: int) -> Factors:
    """Truncated SVD of `(..., m, n)` with rank <= m <= n."""
    m, block = wide.shape[-2], max(_LANCZOS_MIN_BLOCK, -(-rank // 4))
    if m <= _TINY_SIDE:
        return _cut(torch.linalg.svd(wide, full_matrices=False), rank)
    if m < 2 * _LANCZOS_BLOCKS * block:
        return _projected(wide, torch.linalg.eigh(_gram(wide)).eigenvectors[..., -rank:].flip(-1))
    left, rows, failed = _lanczos(wide, rank, block)
    return _subspace_svd(wide, rank, _LANCZOS_BLOCKS * block) if failed.any() else _split(left, rows)


def _gram(wide: Tensor) -> Tensor:
    """Lower triangle of `wide @ wide.mT`, `(..., m, m)`, which is all that `eigh` reads; the rest is undefined."""
    m = wide.shape[-2]
    gram = wide.new_empty(*wide.shape[:-1], m)
    for start in range(0, m, _GRAM_PANEL):
        stop = start + _GRAM_PANEL
        gram[..., start:stop, :stop] = wide[..., start:stop, :] @ wide[..., :stop, :].mT
    return gram


def _projected(wide: Tensor, left: Tensor) -> Factors:
    """SVD of the projection onto left singular vectors `(..., m, r)`: exact where they span the whole space."""
    return _split(left, left.mT @ wide)


def _split(left: Tensor, rows: Tensor) -> Factors:
    """Splits `S * Vh`, `(..., r, n)`, into descending values and unit rows, in place."""
    values = torch.linalg.vector_norm(rows, dim=-1)
    if (values.diff() > 0).any():  # rounding has swapped close ones
        values, order = values.sort(descending=True)
        left, rows = left.take_along_dim(order.unsqueeze(-2), -1), rows.take_along_dim(order.unsqueeze(-1), -2)
    return left, values, rows.div_(values.clamp_min(torch.finfo(rows.dtype).tiny).unsqueeze(-1))


def _lanczos(wide: Tensor, rank: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading Rayleigh-Ritz vectors of `wide @ wide.mT` on the Krylov space of a random block.

    Returns:
        `U (..., m, r)`, `U.mT @ wide (..., r, n)`, and whether the space ended too early for them to be right `(...)`.
    """
    *batch, m, n = wide.shape
    dimension = _LANCZOS_BLOCKS * block
    basis, images = wide.new_empty(*batch, dimension, m), wide.new_empty(*batch, dimension, n)  # images = basis @ wide
    ritz = wide.new_zeros(*batch, dimension, dimension)  # lower triangle of images @ images.mT: block tridiagonal
    failed = torch.zeros(batch, dtype=torch.int32, device=wide.device)
    rows = torch.linalg.qr(_gaussian(wide, block)).Q.mT
    for start in range(0, dimension, block):
        stop, recent = start + block, slice(max(start - block, 0), start + block)
        basis[..., start:stop, :] = rows
        images[..., start:stop, :] = image = rows @ wide
        ritz[..., start:stop, recent] = coupling = image @ images[..., recent, :].mT
        if stop == dimension:
            break
        scale, image_failed = _inverse_cholesky(coupling[..., -block:])  # scale @ image has orthonormal rows
        rows = (scale @ image) @ wide.mT - (scale @ coupling) @ basis[..., recent, :]
        rows = rows - (rows @ basis[..., :stop, :].mT) @ basis[..., :stop, :]
        scale, rows_failed = _inverse_cholesky(rows @ rows.mT)
        rows, failed = scale @ rows, failed + image_failed + rows_failed
    vectors = torch.linalg.eigh(ritz).eigenvectors[..., -rank:].flip(-1)  # (..., dimension, r)
    left = basis.mT @ vectors
    skew = (left.mT @ left - torch.eye(rank, dtype=left.dtype, device=left.device)).abs().amax((-2, -1))
    return left, vectors.mT @ images, (failed > 0) | ~(skew < 1e-4)  # a NaN fails


def _inverse_cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of the lower Cholesky factor `(..., b, b)`, and a value above zero where there is none `(...)`."""
    lower, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(lower.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower, identity, upper=False), failed


def _subspace_svd(wide: Tensor, rank: int, dimension: int) -> Factors:
    """Subspace iteration by Householder QR, for what stops Lanczos, most often a rank below the dimension."""
    basis = _gaussian(wide, dimension)
    for _ in range(_SUBSPACE_STEPS):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ basis).Q).Q  # (..., m, dimension)
    left, values, right = torch.linalg.svd(basis.mT @ wide, full_matrices=False)
    return _cut((basis @ left, values, right), rank)


def _gaussian(wide: Tensor, count: int) -> Tensor:
    """Random columns `(..., m, count)`, the same in every call and on every device."""
    columns = torch.randn(wide.shape[-2], count, generator=torch.Generator().manual_seed(0), dtype=wide.dtype)
    return columns.to(wide.device).expand(*wide.shape[:-2], -1, -1)
