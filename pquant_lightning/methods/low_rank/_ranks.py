"""How many singular values are signal: the analytic solution of empirical variational Bayesian matrix factorization."""

import math

import torch
from torch import Tensor

_GRID = 256  # noise levels that are tried, evenly in the logarithm, before the best one is refined


def evbmf_rank(singular: Tensor, rows: int, columns: int) -> int:
    """The rank that empirical variational Bayes finds in a matrix of signal plus independent noise; 0 for noise alone.

    The noise variance is not given: it is where the free energy is least. Above it the solution is a threshold on the
    singular values, sqrt(max(m, n) * variance * (1 + t) (1 + a / t)) with a = min(m, n) / max(m, n) and
    t = 2.5129 sqrt(a).

    Args:
        singular: all `min(rows, columns)` singular values.
        rows: m.
        columns: n.

    References:
        Nakajima, Sugiyama, Babacan and Tomioka, "Global analytic solution of fully-observed variational Bayesian
        matrix factorization", JMLR 2013, theorem 2 and corollary 1.

    >>> evbmf_rank(torch.linalg.svdvals(torch.eye(50, 40) * 0 + torch.ones(50, 40)), 50, 40)
    1
    """
    small, large = min(rows, columns), max(rows, columns)
    squares = singular.double().square()
    total = float(squares.sum())
    if total == 0:
        return 0
    ratio = small / large
    limit = 2.5129 * math.sqrt(ratio)
    edge = (1 + limit) * (1 + ratio / limit)  # of s^2 / (large * variance), above which a component is signal
    most = min(math.ceil(small / (1 + ratio)) - 1, small - 1)
    low = max(float(squares[most]) / (large * edge), float(squares[most:].mean()) / large, 1e-12 * total)
    high = max(total / (small * large), low)
    for _ in range(3):  # each time ever closer around the best
        levels = torch.logspace(math.log10(low), math.log10(high), _GRID, dtype=torch.float64)
        best = int(_free_energy(squares / large, levels, ratio, edge).argmin())
        low, high = float(levels[max(best - 1, 0)]), float(levels[min(best + 1, _GRID - 1)])
    return int((squares > large * edge * float(levels[best])).sum())


def _free_energy(scaled: Tensor, levels: Tensor, ratio: float, edge: float) -> Tensor:
    """Twice the free energy per column, up to a constant, at each noise variance `(levels,)`; `scaled` is s^2 / n."""
    x = scaled / levels[:, None]  # (levels, k)
    signal = x > edge
    y = torch.where(signal, x, edge)
    t = 0.5 * (y - (1 + ratio) + ((y - (1 + ratio)).square() - 4 * ratio).clamp_min(0).sqrt())
    kept = y - t + torch.log((t + 1) / y) + ratio * torch.log(t / ratio + 1)
    noise = x - torch.log(x.clamp_min(1e-300))
    return torch.where(signal, kept, noise).sum(1)
