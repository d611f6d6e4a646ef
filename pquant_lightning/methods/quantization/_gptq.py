"""GPTQ: weights are rounded one input after the other, and those still to come make up for the error on the output."""

import torch
from torch import Tensor

from pquant_lightning.core.affine import top_code
from pquant_lightning.core.moments import relative_moment

_BLOCK = 32  # inputs rounded before the others are corrected, by one product of matrices


def gptq_codes(
    weight: Tensor,
    moment: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    act_order: bool = True,
    damping: float = 0.01,
) -> Tensor:
    """Codes for which the squared error of the outputs, tr((W - W') M (W - W')^T), is small; many layers at a time.

    Weights that are exactly zero have been pruned and stay zero; the others make up for them.

    Args:
        weight: `(layers, out, in)`.
        moment: M, second moment of the inputs, `(layers, in, in)`, in any unit; need not have full rank.
        scale: of the grid, `(layers, out, groups)`; groups lie one after the other along the inputs.
        zero: zero points, shaped as `scale`, whole codes where a weight is zero; None for symmetric codes.
        bits: 2 to 8.
        act_order: round inputs of large second moment first. Each weight keeps the scale of its own group, so that no
            permutation need be stored.
        damping: share of the moment's mean diagonal that is added to the diagonal; ten times as much, and again, where
            the moment is still not positive definite.

    Returns:
        float32 codes, shaped as the weight.

    References:
        Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023,
        algorithm 1. Frantar & Alistarh, "SparseGPT", 2023, section 3.5: zeros are codes like any other.
    """
    layers, _, inputs = weight.shape
    order = moment.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    if not act_order:
        order = torch.arange(inputs, device=weight.device).expand(layers, inputs)
    rows = order[:, :, None]  # (layers, in, 1)
    moment = relative_moment(moment).take_along_dim(rows, 1).take_along_dim(order[:, None, :], 2)
    factor = _inverse_factor(moment, damping).float()
    columns = weight.float().mT.take_along_dim(rows, 1)  # (layers, in, out), changed below
    group = rows // (inputs // scale.shape[2])
    steps = scale.float().mT.take_along_dim(group, 1)
    zeros = None if zero is None else zero.float().mT.take_along_dim(group, 1)
    codes = _round_in_order(columns, factor, steps, zeros, bits)
    return torch.empty_like(codes).scatter_(1, rows.expand_as(codes), codes).mT.contiguous()


def _round_in_order(columns: Tensor, factor: Tensor, steps: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    low, high = (-top_code(bits), top_code(bits)) if zeros is None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    inverse, codes = steps.reciprocal(), torch.empty_like(columns)
    pruned = columns == 0
    keeps_zeros = bool(pruned.any())
    inputs = columns.shape[1]
    for first in range(0, inputs, _BLOCK):
        last = min(first + _BLOCK, inputs)
        for i in range(first, last):
            row, code = columns[:, i], codes[:, i]
            torch.mul(row, inverse[:, i], out=code)
            if zeros is not None:
                code += zeros[:, i]
            code.round_().clamp_(low, high)
            if keeps_zeros:
                code.copy_(torch.where(pruned[:, i], 0.0 if zeros is None else zeros[:, i], code))
            level = code if zeros is None else code - zeros[:, i]
            row.addcmul_(level, steps[:, i], value=-1)  # the row now holds its error
            columns[:, i + 1 : last].addcmul_(factor[:, i, i + 1 : last, None], row[:, None], value=-1)
        if last < inputs:
            columns[:, last:].baddbmm_(factor[:, first:last, last:].mT, columns[:, first:last], alpha=-1)
    return codes


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the damped moment's inverse, its rows divided by their diagonal; `(layers, in, in)`.

    The moment is relative to its mean diagonal.
    """
    diagonal = moment.diagonal(dim1=1, dim2=2)
    share = torch.full_like(diagonal[:, 0], damping)
    while True:
        damped = moment + torch.diag_embed(share[:, None].expand_as(diagonal))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.any():
            return upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
        share = torch.where(failed > 0, 10 * share, share)
