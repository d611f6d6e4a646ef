"""How an adapter starts: factors B A, as `(groups, out, r)` and `(groups, r, in)`, from the weight below."""

from collections.abc import Callable

import torch
from torch import Tensor

from pquant_lightning.core.affine import blocks, mse_scale, symmetric_codes, unblock
from pquant_lightning.methods.low_rank import _truncated_svd

Matrices = tuple[Tensor, Tensor]


@torch.no_grad()
def principal_factors(matrices: Tensor, rank: int) -> Matrices:
    """The best approximation of that rank, split evenly: B A = U S V^T.

    Args:
        matrices: `(groups, out, in)`.
        rank: of each group; at most min(out, in).

    References:
        Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024, equations 2 and 3. Their
        base is the weight less B A; ours is the weight, and the initial product is taken off in the forward.
    """
    u, s, vh = _truncated_svd.truncated_svd(matrices, rank)
    root = s.sqrt()
    return u * root.unsqueeze(-2), root.unsqueeze(-1) * vh


@torch.no_grad()
def orthonormal_factors(matrices: Tensor, rank: int) -> Matrices:
    """The first columns of Q and the first rows of R of the QR decomposition; arguments as in `principal_factors`.

    References:
        Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, algorithm 1.
    """
    q, r = torch.linalg.qr(matrices if matrices.dtype == torch.float64 else matrices.float())
    return q[..., :rank], r[..., :rank, :]


@torch.no_grad()
def quantization_factors(
    weight: Tensor,
    rank: int,
    bits: int,
    iterations: int,
    to_matrices: Callable[[Tensor], Tensor],
    to_weight: Callable[[Tensor], Tensor],
) -> Matrices:
    """Factors of what rounding loses: `||W - round(W - B A) - B A||` is made small by turns.

    Args:
        weight: of an ordinary layer; the channels that are rounded on a scale of their own come first. What is exactly
            zero has been pruned, and is taken to stay zero below the adapter.
        rank: of each group; at most min(out, in).
        bits: 2 to 8, of the quantizer that the weight less B A will meet.
        iterations: turns of rounding and decomposition.
        to_matrices: the weight as `(groups, out, in)`.
        to_weight: its inverse.

    References:
        Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, algorithm 1. The
        rounding is ours: symmetric, on a scale per channel.
    """
    product, pruned = torch.zeros_like(weight), weight == 0
    for _ in range(iterations):
        lost = weight - rounded((weight - product).masked_fill(pruned, 0), bits)
        left, right = principal_factors(to_matrices(lost), rank)
        product = to_weight(left @ right).to(weight.dtype)
    return left, right


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The nearest weight on symmetric grids, one for each entry of the first dimension."""
    values = blocks(weight, 0)
    scale = mse_scale(values, bits)
    return unblock(symmetric_codes(values, scale, bits) * scale[..., None], weight.shape, 0).to(weight.dtype)
