"""Decompositions of least output error: the weight in the norm of the second moment of its inputs.

With C = E[x x^T] = S S^T, the error E ||W x - W' x||^2 is that of W S in the Frobenius norm. A decomposition keeps its
form when a mode of the input is multiplied by a matrix, so W S is decomposed and S taken off the input's factor again:
for a convolution S is the root of the moment of its channels, which a first factor of size 1x1 sees exactly; for a
Linear, whose input is split into modes, one root per mode, which together stand for the moment as a Kronecker product.
What the last factor makes of the others (of a CP matrix the factors of the output, of a train each core in turn) is
then fitted to the whole moment by least squares. The decomposition of the weight alone is a candidate as well, and what
has the smaller output error on the samples is taken, so that it never has the larger one.

Reference: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
2024, for matrices.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pquant_lightning.core.moments import column_moment, damped_root, energy
from pquant_lightning.methods.tensor_networks._cp_als import balanced_terms, cp_als, khatri_rao

Split = Callable[[Tensor], tuple[Tensor, Tensor]]

_SWEEPS = 3  # of least squares over the two factors of the output of a CP matrix


def correction(left: Tensor, wanted: Tensor, seen: Tensor) -> Tensor:
    """A step of damped least squares for `left`, which never increases tr(L A L^T) - 2 tr(L B^T).

    Args:
        left: L `(groups, m, r)`.
        wanted: B `(groups, m, r)`, E[y z^T] for outputs y and what the last factor reads, z.
        seen: A `(groups, r, r)`, E[z z^T].
    """
    root = damped_root(seen)
    return left if root is None else left + torch.cholesky_solve((wanted - left @ seen).mT, root).mT


# -- convolutions ------------------------------------------------------------------------------------------------------


def kernel_rows(kernel: Tensor, n: int) -> Tensor:
    """A kernel `(groups, c, in, k)` as `(groups, c, p, n)`: p rows over what its moments are of.

    For a convolution that is a whole window, p = 1; for a transposed one the channels at a point, p = k.
    """
    return kernel.flatten(2).unsqueeze(2) if kernel[0, 0].numel() == n else kernel.transpose(2, 3)


def seen_kernel(kernel: Tensor, moment: Tensor) -> Tensor:
    """A kernel `(groups, out, in, k)` in the norm of the moment of its input channels; itself for a moment of zero."""
    root = _channel_root(kernel, moment)
    return kernel if root is None else torch.einsum("goik,gij->gojk", kernel, root.to(kernel.dtype))


def _channel_root(kernel: Tensor, moment: Tensor) -> Tensor | None:
    return damped_root(column_moment(moment, moment.shape[-1] // kernel.shape[2]).double())


@torch.no_grad()
def fit_kernel(kernel: Tensor, moment: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """A decomposition `left @ inner` of kernels whose output error is at most that of `split(kernel)`.

    Args:
        kernel: W `(groups, out, in, k)`.
        moment: C `(groups, n, n)`, n = in * k, or of a transposed convolution n = in.
        split: decomposes such kernels into `left (groups, out, r)` and `inner (groups, r, in, k)`; multiplying the
            mode `in` of `inner` by a matrix keeps its form.

    Returns:
        `left` and `inner`, float64.
    """
    kernel, moment = kernel.double(), moment.double()
    groups, n, root = len(kernel), moment.shape[-1], _channel_root(kernel, moment)
    rows = kernel_rows(kernel, n)
    outputs = (rows @ moment.unsqueeze(1)).flatten(2)
    found = []
    for own in (None,) if root is None else (None, root):
        left, inner = split(kernel if own is None else seen_kernel(kernel, moment))
        if own is not None:
            inner = torch.linalg.solve_triangular(own.mT.unsqueeze(1), inner, upper=True)
        read = kernel_rows(inner, n)
        seen = (read @ moment.unsqueeze(1)).flatten(2) @ read.flatten(2).mT
        left = correction(left, outputs @ read.flatten(2).mT, seen)
        error = rows - (left @ read.flatten(2)).unflatten(2, rows.shape[2:])
        found.append((energy(error.reshape(groups, -1, n), moment), left, inner))
    _, left, inner = min(found, key=lambda pair: pair[0])
    return left, inner


# -- matrices ----------------------------------------------------------------------------------------------------------


def mode_roots(moment: Tensor, modes: Sequence[int]) -> list[Tensor] | None:
    """Roots of the moments of each mode of an input, traced over the others; None for a moment of zero.

    Args:
        moment: C `(n, n)`; the input is padded with zeros to the product of the modes.
        modes: n_1, n_2, ...

    >>> factors = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([1.0, 9.0, 25.0]))
    >>> roots = mode_roots(torch.kron(*factors), (2, 3))
    >>> torch.allclose((roots[1] / roots[1][0, 0])[2, 2], torch.tensor(5.0), rtol=0.2)
    True
    """
    size, moment = math.prod(modes), pad_moment(moment, modes)
    roots = []
    before = 1
    for mode in modes:
        after = size // before // mode
        traced = torch.einsum("pmqpnq->mn", moment.reshape(before, mode, after, before, mode, after))
        root = damped_root(traced.unsqueeze(0))
        if root is None:
            return None
        roots.append(root[0])
        before *= mode
    return roots


def scale_modes(matrix: Tensor, roots: Sequence[Tensor], undo: bool = False) -> Tensor:
    """`W (S_1 (x) S_2 (x) ...)` for W `(m, n_1 n_2 ...)`, mode by mode; or with the inverses."""
    tensor = matrix.unflatten(1, [root.shape[0] for root in roots])
    for axis, root in enumerate(roots, start=1):
        last = tensor.movedim(axis, -1)
        last = torch.linalg.solve_triangular(root, last, upper=False, left=False) if undo else last @ root
        tensor = last.movedim(-1, axis)
    return tensor.flatten(1)


def pad_moment(moment: Tensor, modes: Sequence[int]) -> Tensor:
    """A moment `(n, n)` with zeros up to the product of the modes."""
    missing = math.prod(modes) - moment.shape[-1]
    return F.pad(moment, (0, missing, 0, missing)) if missing else moment


def padded_matrix(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """A matrix with zeros up to the products of its modes."""
    missing = math.prod(columns) - matrix.shape[1], math.prod(rows) - matrix.shape[0]
    return F.pad(matrix, (0, missing[0], 0, missing[1])) if any(missing) else matrix


@torch.no_grad()
def fit_matrix(
    weight: Tensor,
    moment: Tensor,
    modes: tuple[Sequence[int], Sequence[int]],
    approximate: Callable[[Tensor], Tensor],
    refit: Callable[[Tensor], Tensor],
) -> Tensor:
    """An approximation of a matrix whose output error is at most that of `approximate`.

    Args:
        weight: W `(m, n)`.
        moment: C `(n, n)`.
        modes: of rows and of columns.
        approximate: gives another matrix for one of the padded size; multiplying modes of its columns by matrices keeps
            its form.
        refit: makes such an approximation better for the outputs, as a rule.

    Returns:
        `(m, n)`, padded; float64.
    """
    weight, moment = weight.double(), moment.double()
    padded = padded_matrix(weight, *modes)
    found = [approximate(padded)]
    if (roots := mode_roots(moment, modes[1])) is not None:
        found.append(scale_modes(approximate(scale_modes(padded, roots)), roots, undo=True))
    m, n = weight.shape

    def error(matrix: Tensor) -> float:
        return energy(weight - matrix[:m, :n], moment)

    best = min(found, key=error)
    return min(best, refit(best), key=error)


@torch.no_grad()
def fit_cp_matrix(
    weight: Tensor, moment: Tensor, modes: tuple[Sequence[int], Sequence[int]], rank: int
) -> list[Tensor]:
    """CP factors of a matrix whose output error is at most that of `cp_als`.

    Args:
        weight: W `(m, n)`.
        moment: C `(n, n)`.
        modes: two of rows and two of columns.
        rank: number of terms R.

    Returns:
        The factors of out_1, out_2, in_1 and in_2, `(1, n_k, R)` each, balanced; float64.
    """
    weight, moment = weight.double(), moment.double()
    padded, shape = padded_matrix(weight, *modes), (1, *modes[0], *modes[1])
    found = [cp_als(padded.reshape(shape), rank, num_rows=2)]
    if (roots := mode_roots(moment, modes[1])) is not None:
        *outputs, first, second = cp_als(scale_modes(padded, roots).reshape(shape), rank, num_rows=2)
        undone = [
            torch.linalg.solve_triangular(root.mT, factor, upper=True)
            for root, factor in zip(roots, (first, second), strict=True)
        ]
        found.append(balanced_terms([*outputs, *undone]))
    found += [balanced_terms(_refit_outputs(padded, moment, factors)) for factors in found]
    return min(found, key=partial(_cp_error, weight, moment))


def _cp_error(weight: Tensor, moment: Tensor, factors: list[Tensor]) -> float:
    matrix = (khatri_rao(factors[:2]) @ khatri_rao(factors[2:]).mT)[0]
    return energy(weight - matrix[: weight.shape[0], : weight.shape[1]], moment)


def _refit_outputs(padded: Tensor, moment: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """The factors of the output, fitted in turns by least squares to the outputs of W."""
    n = moment.shape[-1]
    out = list(factors[:2])
    read = khatri_rao(factors[2:])[:, :n]
    seen = read.mT @ moment @ read  # (1, R, R)
    wanted = (padded[:, :n] @ moment @ read).unflatten(1, (out[0].shape[1], out[1].shape[1]))  # (1, out_1, out_2, R)
    for _ in range(_SWEEPS):
        for own in (1, 0):
            other = out[1 - own]
            right_hand = (wanted * other.unsqueeze(1 + own)).sum(2 - own)
            out[own] = correction(out[own], right_hand, (other.mT @ other) * seen)
    return [*out, *factors[2:]]
