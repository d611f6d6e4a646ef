"""Canonical polyadic (CP) decomposition by alternating least squares, from a start of orthonormal rank-one terms.

The modes are held as rows and columns of one matrix: a sweep then needs two large products, one per side, and the modes
of a side share theirs. TensorLy's default makes one per mode.
"""

import math

import torch
from torch import Tensor

from pquant_lightning.methods.tensor_networks._tt_svd import positive, split

SWEEPS = 100  # at most
TOLERANCE = 2e-5  # of the relative error within `CHECKED` sweeps: ends the sweeps
CHECKED = 5
RIDGE = 1e-6  # share of a Gram matrix's mean diagonal that is added to it: bounds components that cancel each other


@torch.no_grad()
def cp_als(tensor: Tensor, rank: int, num_rows: int, sweeps: int = SWEEPS) -> list[Tensor]:
    """Approximates each tensor of a batch as a sum of rank-one terms.

    Deterministic. The start is the leading terms of a decomposition into orthonormal rank-one terms; where `rank`
    reaches `cp_full_rank` it is exact, and nothing is iterated.

    Args:
        tensor: `(batch, n_1, ..., n_d)`, d of 2 to 4.
        rank: number of terms R.
        num_rows: how many leading modes are the rows of the matrix that the tensor is held as.
        sweeps: at most so many; they end when the relative error falls by less than 2e-5 in five.

    Returns:
        d factors `(batch, n_k, R)`; in each term the vectors of all modes have the same norm. float64 for float64,
        otherwise float32.

    References:
        Kolda and Bader, Tensor decompositions and applications, 2009, section 3.4 (ALS); Batselier et al., A
        constructive algorithm for decomposing a tensor into a finite sum of orthonormal rank-1 terms, 2015 (the start);
        Phan et al., Stable low-rank tensor decomposition for compression of convolutional neural network, 2020 (why
        terms that cancel each other must be kept small).

    >>> factors = cp_als(torch.ones(1, 3, 4, 5), rank=1, num_rows=2)
    >>> torch.allclose(cp_dense(factors), torch.ones(1, 3, 4, 5), atol=1e-5)
    True
    """
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    batch, *modes = tensor.shape
    matrix = tensor.reshape(batch, math.prod(modes[:num_rows]), -1)
    factors = _orthonormal_terms(matrix, modes, num_rows, rank)
    if rank < cp_full_rank(modes, num_rows):
        factors = _iterate(matrix, factors, num_rows, sweeps)
    return balanced_terms(factors)


def cp_full_rank(modes: list[int], num_rows: int) -> int:
    """Number of rank-one terms with which the start is exact."""
    rows, columns = modes[:num_rows], modes[num_rows:]
    matrix = min(math.prod(rows), math.prod(columns))
    return matrix * math.prod(min(side) for side in (rows, columns) if len(side) == 2)


def cp_dense(factors: list[Tensor]) -> Tensor:
    """The tensors `(batch, n_1, ..., n_d)` that CP factors `(batch, n_k, R)` stand for."""
    half = (len(factors) + 1) // 2
    dense = khatri_rao(factors[:half]) @ khatri_rao(factors[half:]).mT
    return dense.reshape(dense.shape[0], *(factor.shape[1] for factor in factors))


def khatri_rao(factors: list[Tensor]) -> Tensor:
    """Column-wise Kronecker product of `(..., n_k, R)`: `(..., n_1 * n_2 * ..., R)`."""
    product = factors[0]
    for factor in factors[1:]:
        product = (product.unsqueeze(-2) * factor.unsqueeze(-3)).flatten(-3, -2)
    return product


def _orthonormal_terms(matrix: Tensor, modes: list[int], num_rows: int, rank: int) -> list[Tensor]:
    """The largest `rank` terms of the matrix's SVD whose vectors are, by their own SVDs, sums of rank-one terms."""
    batch = matrix.shape[0]
    u, s, rest, _ = split(matrix.double(), min(rank, *matrix.shape[1:]))
    vh = rest / positive(s).unsqueeze(-1)
    left, left_weight = _side_terms(u.mT, modes[:num_rows])  # vectors (batch, r, a, n_k), weights (batch, r, a)
    right, right_weight = _side_terms(vh, modes[num_rows:])
    weight = s[..., None, None] * left_weight.unsqueeze(-1) * right_weight.unsqueeze(-2)  # (batch, r, a, b)
    count = min(rank, weight[0].numel())
    top, index = weight.flatten(1).topk(count)  # (batch, count)
    term, of_left, of_right = (index // (weight.shape[2] * weight.shape[3]), index // weight.shape[3], index)
    of_left, of_right = of_left % weight.shape[2], of_right % weight.shape[3]
    rows = torch.arange(batch, device=matrix.device).unsqueeze(-1)
    factors = [vectors[rows, term, of_left] for vectors in left]
    factors += [vectors[rows, term, of_right] for vectors in right]
    factors[0] = factors[0] * top.unsqueeze(-1)
    return [_widened(factor.mT, rank).to(matrix.dtype) for factor in factors]  # (batch, n_k, rank)


def _side_terms(vectors: Tensor, modes: list[int]) -> tuple[list[Tensor], Tensor]:
    """Unit vectors `(batch, r, n)` of one or two modes as sums of weighted rank-one terms."""
    if len(modes) == 1:
        return [vectors.unsqueeze(2)], vectors.new_ones(*vectors.shape[:2], 1)
    u, s, vh = torch.linalg.svd(vectors.unflatten(-1, modes), full_matrices=False)
    return [u.mT, vh], s


def _widened(factor: Tensor, rank: int) -> Tensor:
    """Zero columns up to `rank`, where the tensor has fewer terms."""
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def _iterate(matrix: Tensor, factors: list[Tensor], num_rows: int, sweeps: int) -> list[Tensor]:
    """Sweeps of ridge-regularized alternating least squares, until the error settles."""
    squared_norm = matrix.square().sum((1, 2))  # (batch,)
    grams = [factor.mT @ factor for factor in factors]
    before = torch.full_like(squared_norm, torch.inf)
    for sweep in range(1, sweeps + 1):
        rows, columns = factors[:num_rows], factors[num_rows:]
        _update_side(matrix @ khatri_rao(columns), rows, grams, 0)
        factors = [*rows, *columns]
        product = _update_side(matrix.mT @ khatri_rao(rows), columns, grams, num_rows)
        factors = [*rows, *columns]
        if sweep % CHECKED == 0:
            squared = squared_norm - 2 * (product * factors[-1]).sum((1, 2)) + _product(grams).sum((1, 2))
            error = (squared.clamp_min(0) / squared_norm.clamp_min(1e-30)).sqrt()
            if bool((before - error < TOLERANCE).all()):
                break
            before = error
    return factors


def _update_side(product: Tensor, side: list[Tensor], grams: list[Tensor], first: int) -> Tensor:
    """Solves for the one or two factors of a side in turn, in place, with the matrix's product with the other side.

    Args:
        product: `(batch, n, R)`, n the product of the side's modes.
        side: the factors, `(batch, n_k, R)` each.
        grams: of all factors, kept up to date.
        first: the number of the side's first mode.

    Returns:
        The last right-hand side `(batch, n_k, R)`.
    """
    right_hand = product
    by_mode = product.unflatten(1, [factor.shape[1] for factor in side])  # (batch, n_1, n_2, R)
    for mode in range(len(side)):
        if len(side) == 2:
            other = side[1 - mode].unsqueeze(1 + mode)
            right_hand = (by_mode * other).sum(2 - mode)
        gram = _product([grams[k] for k in range(len(grams)) if k != first + mode])
        ridge = RIDGE * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        side[mode] = torch.linalg.solve(gram, right_hand.mT).mT
        grams[first + mode] = side[mode].mT @ side[mode]
    return right_hand


def _product(grams: list[Tensor]) -> Tensor:
    """Elementwise product."""
    product = grams[0]
    for gram in grams[1:]:
        product = product * gram
    return product


def balanced_terms(factors: list[Tensor]) -> list[Tensor]:
    """The same terms with vectors of equal norms: modes of one scale train well."""
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True) for factor in factors]  # (batch, 1, R)
    mean = _product(norms).pow(1 / len(factors))
    return [factor * (mean / norm.clamp_min(1e-30)) for factor, norm in zip(factors, norms, strict=True)]
