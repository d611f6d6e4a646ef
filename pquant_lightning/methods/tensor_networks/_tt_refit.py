"""Least-squares fits of the cores of a tensor-train matrix, one after another, to the outputs of the weight."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pquant_lightning.methods.tensor_networks._output_fit import correction, pad_moment, padded_matrix

SWEEPS = 2
MOST_NUMBERS = 2**22  # in a matrix built on the way, 32 MiB: a core for which one is larger stays as it is


@torch.no_grad()
def refit_cores(
    cores: list[Tensor], weight: Tensor, moment: Tensor, modes: tuple[Sequence[int], Sequence[int]]
) -> list[Tensor]:
    """The train after sweeps of alternating least squares, each core with the others held: the error never increases.

    Args:
        cores: `(r_k, row_k, column_k, r_{k+1})`, float64.
        weight: W `(m, n)`; zeros pad it to the products of the modes, and outputs in the padding count as zeros.
        moment: C `(n, n)`.
        modes: of rows and of columns.
    """
    wanted, moment = padded_matrix(weight, *modes), pad_moment(moment, modes[1])
    seen_weight, cores = wanted @ moment, list(cores)
    for place in [*range(len(cores)), *reversed(range(len(cores)))] * (SWEEPS // 2):
        cores[place] = _refit(cores, place, seen_weight, moment)
    return cores


def _refit(cores: list[Tensor], place: int, seen_weight: Tensor, moment: Tensor) -> Tensor:
    rank, row, column, right = cores[place].shape
    before, after = _left_part(cores[:place]), _right_part(cores[place + 1 :])  # (o, i, r), (r, o, i)
    inside, outside = before.shape[1], after.shape[2]
    sizes = (inside * rank) ** 2, (outside * right) ** 2, (rank * column * outside) ** 2, (rank * column * right) ** 2
    if max(sizes) > MOST_NUMBERS:
        return cores[place]
    by_mode = moment.reshape(inside, column, outside, inside, column, outside)
    half = torch.einsum("xaXA,xipXIP->aipAIP", torch.einsum("oxa,oXA->xaXA", before, before), by_mode)
    seen = torch.einsum("aipAIP,bpBP->aibAIB", half, torch.einsum("bop,BoP->bpBP", after, after))
    rows = seen_weight.reshape(before.shape[0], row, after.shape[1], inside, column, outside)
    given = torch.einsum("oxa,oqzxip->aqzip", before, rows)
    given = torch.einsum("aqzip,bzp->qaib", given, after).reshape(1, row, -1)
    own = cores[place].permute(1, 0, 2, 3).reshape(1, row, -1)
    fitted = correction(own, given, seen.reshape(1, own.shape[-1], -1))
    return fitted.reshape(row, rank, column, right).transpose(0, 1)


def _left_part(cores: list[Tensor]) -> Tensor:
    """The first cores as one `(rows, columns, r)`."""
    part = torch.ones(1, 1, 1, dtype=torch.float64)
    for core in cores:
        part = torch.einsum("oxa,aqib->oqxib", part.to(core), core).flatten(2, 3).flatten(0, 1)
    return part if not cores else part.to(cores[0])


def _right_part(cores: list[Tensor]) -> Tensor:
    """The last cores as one `(r, rows, columns)`."""
    part = torch.ones(1, 1, 1, dtype=torch.float64)
    for core in reversed(cores):
        part = torch.einsum("aqib,bzp->aqzip", core, part.to(core)).flatten(3, 4).flatten(1, 2)
    return part if not cores else part.to(cores[0])
