"""Factorizations of weights beside the truncated SVD, as functions on batches of matrices `(groups, m, n)`.

All are deterministic and compute in float32 (float64 for float64). Where factors may be scaled against each other, they
are balanced: of equal norm, column by column, since uneven factors fine-tune badly.
"""

import math

import torch
from torch import Tensor

from pquant_lightning.methods.low_rank import _truncated_svd

Pair = tuple[Tensor, Tensor]


def _working(matrix: Tensor) -> Tensor:
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def balanced(left: Tensor, right: Tensor) -> Pair:
    """The same product with column k of `left (..., m, r)` and row k of `right (..., r, n)` of equal norm."""
    tiny = torch.finfo(left.dtype).tiny
    a, b = torch.linalg.vector_norm(left, dim=-2), torch.linalg.vector_norm(right, dim=-1)
    ratio = torch.where((a > 0) & (b > 0), (b / a.clamp_min(tiny)).sqrt(), torch.ones_like(a))
    return left * ratio.unsqueeze(-2), right / ratio.unsqueeze(-1)


# -- semi-nonnegative ------------------------------------------------------------------------------------------------


@torch.no_grad()
def semi_nmf(matrix: Tensor, rank: int, iterations: int = 30) -> Pair:
    """A matrix of any sign as a product in which the factor of the smaller side is nonnegative.

    A nonnegative factorization proper needs a nonnegative matrix; for weights of both signs the literature lets the
    other factor be free. The start is exact for the best approximation of rank `rank - 1` (each right singular vector
    is shifted to be nonnegative, one more column takes the shifts back), so the error is never above that one's; the
    alternating updates never increase it. At the full rank the product is exact.

    Args:
        matrix: `(..., m, n)`.
        rank: columns of the factors, at most min(m, n).
        iterations: updates of both factors.

    Returns:
        `left (..., m, r)` and `right (..., r, n)`, balanced; `right >= 0` where n <= m, else `left >= 0`.

    References:
        Ding, Li and Jordan, "Convex and semi-nonnegative matrix factorizations", 2010, equations 10 and 11.
        Gillis and Kumar, "Exact and heuristic algorithms for semi-nonnegative matrix factorization", 2015, theorem 1
        (the shift); our start differs in that the SVD of one rank less is shifted as a whole.

    >>> matrix = torch.tensor([[1.0, -1.0], [2.0, 3.0], [0.0, -4.0]])
    >>> left, right = semi_nmf(matrix, rank=2)
    >>> torch.allclose(left @ right, matrix), bool((right >= 0).all())
    (True, True)
    """
    work = _working(matrix)
    if work.shape[-2] < work.shape[-1]:
        right, left = semi_nmf(work.mT, rank, iterations)
        return left.mT, right.mT
    n = work.shape[-1]
    if rank >= n:
        return balanced(work, torch.eye(n, dtype=work.dtype, device=work.device).expand(*work.shape[:-2], n, n))
    right = _shifted_start(work, rank)
    left = _least_squares_left(work, right)
    tiny = torch.finfo(work.dtype).tiny
    for _ in range(iterations):
        against, gram = left.mT @ work, left.mT @ left  # (..., r, n), (..., r, r)
        gain = against.clamp_min(0) + (-gram).clamp_min(0) @ right
        loss = (-against).clamp_min(0) + gram.clamp_min(0) @ right
        right = right * (gain / loss.clamp_min(tiny)).sqrt()
        left = _least_squares_left(work, right)
    return balanced(left, right)


def _shifted_start(matrix: Tensor, rank: int) -> Tensor:
    """A nonnegative `(..., r, n)` whose rows span the leading r - 1 right singular vectors."""
    vectors = _truncated_svd.truncated_svd(matrix, max(rank - 1, 1))[2]
    if rank == 1:  # the half of the vector that holds more
        positive, negative = vectors.clamp_min(0), (-vectors).clamp_min(0)
        more = positive.square().sum((-2, -1), keepdim=True) >= negative.square().sum((-2, -1), keepdim=True)
        return torch.where(more, positive, negative)
    shifted = vectors - vectors.amin(-1, keepdim=True)
    constant = torch.full_like(shifted[..., :1, :], shifted.shape[-1] ** -0.5)
    return torch.cat([shifted, constant], -2)


def _least_squares_left(matrix: Tensor, right: Tensor) -> Tensor:
    """The `(..., m, r)` for which `left @ right` is closest to the matrix; in float64, as rows may be nearly alike."""
    wide = right.double()
    solved = torch.linalg.lstsq(wide @ wide.mT, wide @ matrix.double().mT, driver="gelsd" if wide.is_cpu else None)
    return solved.solution.mT.to(matrix.dtype)


# -- Kronecker -------------------------------------------------------------------------------------------------------


def kronecker_sizes(m: int, n: int) -> tuple[int, int]:
    """Rows and columns of the left factor for which a sum of Kronecker products has the fewest parameters."""
    pairs = [(a, b) for a in _divisors(m) for b in _divisors(n)]
    return min(pairs, key=lambda pair: (pair[0] * pair[1] + m * n // (pair[0] * pair[1]), abs(pair[0] - pair[1])))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@torch.no_grad()
def kronecker(matrix: Tensor, rank: int, sizes: tuple[int, int]) -> Pair:
    """The closest sum of `rank` Kronecker products, `sum_k A_k (x) B_k`, in the Frobenius norm.

    Args:
        matrix: `(m, n)`.
        rank: number of terms.
        sizes: `(m1, n1)`, the size of each A_k; m1 divides m and n1 divides n.

    Returns:
        `A (r, m1, n1)` and `B (r, m / m1, n / n1)`, term by term of equal norm.

    References:
        Van Loan and Pitsianis, "Approximation with Kronecker products", 1993: rearranged so that each Kronecker product
        is a matrix of rank 1, the best sum is the truncated SVD.

    >>> a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [-1.0]])
    >>> left, right = kronecker(torch.kron(a, b), rank=1, sizes=(1, 2))
    >>> torch.allclose(torch.kron(left[0], right[0]), torch.kron(a, b), atol=1e-5)
    True
    """
    (m, n), (m1, n1) = matrix.shape, sizes
    m2, n2 = m // m1, n // n1
    rearranged = _working(matrix).reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)
    u, s, vh = _truncated_svd.truncated_svd(rearranged, rank)
    root = s.sqrt()
    return (u * root).mT.reshape(-1, m1, n1), (root[:, None] * vh).reshape(-1, m2, n2)


# -- Monarch ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def monarch(matrix: Tensor, rank: int, blocks: int) -> Pair:
    """The closest Monarch matrix: two block-diagonal matrices with permutations between them.

    Seen as `blocks x blocks` blocks (the rows of one are `blocks` apart), each block is of rank `rank`, by itself, so
    the projection is one batched truncated SVD.

    Args:
        matrix: `(m, n)`; `blocks` divides both.
        rank: of each block; 1 in the paper.
        blocks: diagonal blocks in each of the two factors.

    Returns:
        `left (blocks, m / blocks, blocks * r)`, from (input block, r) to the output's block, and
        `right (blocks, blocks * r, n / blocks)`, from each input block to (output block, r).

    References:
        Dao et al., "Monarch: Expressive Structured Matrices for Efficient and Accurate Training", 2022, section 4.2 and
        algorithm 1; there for square matrices and rank 1.
    """
    m, n = matrix.shape
    blocks_of = _working(matrix).reshape(m // blocks, blocks, blocks, n // blocks).permute(1, 2, 0, 3)
    u, s, vh = _truncated_svd.truncated_svd(blocks_of, rank)  # (output block j, input block k, m / blocks, r), ...
    root = s.sqrt()
    left = (u * root.unsqueeze(-2)).transpose(1, 2).flatten(2)  # (j, m / blocks, k * r)
    right = (root.unsqueeze(-1) * vh).transpose(0, 1).flatten(1, 2)  # (k, j * r, n / blocks)
    return left, right


def monarch_matrix(left: Tensor, right: Tensor) -> Tensor:
    """The `(m, n)` matrix of `monarch`'s factors."""
    blocks, rows, _ = left.shape
    u = left.unflatten(2, (blocks, -1))  # (j, i, k, r)
    v = right.unflatten(1, (blocks, -1))  # (k, j, r, p)
    return torch.einsum("jikr,kjrp->ijkp", u, v).reshape(rows * blocks, -1)


# -- CUR -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cur(matrix: Tensor, rank: int) -> Pair:
    """Rows of the matrix itself, and what recovers it from them: `C U` and `R` of a CUR decomposition.

    Args:
        matrix: `(groups, m, n)`.
        rank: number of columns and of rows that are picked.

    Returns:
        `left (groups, m, r)`, in the span of r columns of the matrix, and `right (groups, r, n)`, r of its rows. Exact
        for a matrix of that rank.

    References:
        Sorensen and Embree, "A DEIM induced CUR factorization", 2016. Their picks are the pivots of an LU factorization
        of the singular vectors (section 3.1), which is how they are found here; U = C^+ W R^+.

    >>> matrix = torch.tensor([[[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]])
    >>> left, right = cur(matrix, rank=1)
    >>> right, torch.allclose(left @ right, matrix)
    (tensor([[[3., 6.]]]), True)
    """
    work = _working(matrix)
    u, _, vh = _truncated_svd.truncated_svd(work, rank)
    rows, columns = _deim(u), _deim(vh.mT)
    right = work.take_along_dim(rows.unsqueeze(-1), -2).double()
    picked = work.take_along_dim(columns.unsqueeze(-2), -1).double()
    inner = torch.linalg.pinv(picked) @ work.double() @ torch.linalg.pinv(right)
    return (picked @ inner).to(work.dtype), right.to(work.dtype)


def _deim(vectors: Tensor) -> Tensor:
    """Row indices `(..., r)` of `(..., m, r)`: the pivots of its LU factorization."""
    _, pivots = torch.linalg.lu_factor(vectors)  # (..., r), counted from 1: row i was swapped with row pivots[i]
    order = torch.arange(vectors.shape[-2], device=vectors.device).repeat(*vectors.shape[:-2], 1)
    for i in range(vectors.shape[-1]):
        swapped = pivots[..., i : i + 1].long() - 1
        here, there = order[..., i : i + 1].clone(), order.gather(-1, swapped)
        order[..., i : i + 1] = there
        order.scatter_(-1, swapped, here)
    return order[..., : vectors.shape[-1]]


# -- sparse plus low rank --------------------------------------------------------------------------------------------


@torch.no_grad()
def sparse_plus_low_rank(
    matrix: Tensor, rank: int, density: float, iterations: int = 30
) -> tuple[Tensor, Tensor, Tensor]:
    """A few single weights plus a matrix of low rank, each the best one for the other; the error never grows.

    Args:
        matrix: `(groups, m, n)`.
        rank: of the low-rank part.
        density: share of the weights that the sparse part may keep, over all groups.
        iterations: of the alternation; it ends early where the error stays the same.

    Returns:
        `left (groups, m, r)`, `right (groups, r, n)`, balanced, and `sparse (groups, m, n)`.

    References:
        Zhou and Tao, "GoDec: Randomized low-rank and sparse matrix decomposition in noisy case", 2011, equation 3; by
        truncated SVDs instead of random projections. The start is the sparse part of Netrapalli et al., "Non-convex
        Robust PCA", 2014, algorithm 1: large single weights must not bend the first low rank.
    """
    work = _working(matrix)
    count = math.floor(density * work.numel())
    sparse, error = _largest(work, count), math.inf
    for _ in range(max(iterations, 1)):
        u, s, vh = _truncated_svd.truncated_svd(work - sparse, rank)
        low = (u * s.unsqueeze(-2)) @ vh
        sparse = _largest(work - low, count)
        previous, error = error, float(torch.dist(work, low + sparse))
        if not error < previous * (1 - 1e-4):
            break
    root = s.sqrt()
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * vh, sparse


def _largest(matrix: Tensor, count: int) -> Tensor:
    """The `count` entries of largest magnitude, zeros elsewhere."""
    flat = matrix.flatten()
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(matrix)
