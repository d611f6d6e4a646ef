"""Pruning from data: the norms of what each weight is multiplied with, and SparseGPT's corrected pruning."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pquant_lightning.core.calibration import Samples, visit_inputs
from pquant_lightning.core.layer_adapter import as_torch, build_layer, layer_spec
from pquant_lightning.core.moments import DAMPING, MomentSource, has_moments
from pquant_lightning.core.reduction import reduced_by_name
from pquant_lightning.methods.pruning._layout import layout_of
from pquant_lightning.methods.pruning._selection import check_finite, most_dropped

_MAX_BYTES = 2**30  # of the Hessians held at one time
_BLOCK = 128  # columns pruned before the others are corrected


def covers(layer: nn.Module) -> bool:
    """Whether criteria from data can be computed for this layer: it multiplies its inputs with one weight."""
    ordinary = as_torch(layer)
    return ordinary is not None and has_moments(ordinary)


def squared_input_norms(model: nn.Module, names: list[str], samples: Samples) -> dict[str, Tensor]:
    """For each weight of a layer the sum of squares of all inputs that it is multiplied with.

    It is the gradient, with respect to the weight, of the sum of the layer's outputs for squared inputs: one formula
    for linear layers and for convolutions with groups, strides and padding.

    Returns:
        float32, broadcastable to the weight of the ordinary layer, by layer name; layers that were not reached are
        missing.
    """
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        layer: Any = as_torch(model.get_submodule(name))
        twin = build_layer(layer_spec(layer), bias=False, device="meta")  # without the hook that calls this
        weight = torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=True)
        with torch.enable_grad():
            total = functional_call(twin, {"weight": weight}, (x.float().square(),)).sum()
        (norms,) = torch.autograd.grad(total, weight)
        norms = _distinct(layer, norms)
        found[name] = found[name] + norms if name in found else norms

    visit_inputs(model, names, samples, visit)
    totals = reduced_by_name({name: [norms] for name, norms in found.items()}, names, samples)
    return {name: norms for name, (norms,) in totals.items()}


def _distinct(layer: nn.Module, norms: Tensor) -> Tensor:
    """The norms without the dimension of the outputs, where all of these read the same inputs."""
    if getattr(layer, "groups", 1) > 1:
        return norms
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return norms.narrow(1 if transposed else 0, 0, 1).contiguous()


def prune_with_correction(model: nn.Module, targets: dict[str, tuple[float, Any]], samples: Samples) -> list[str]:
    """Prunes layers by SparseGPT, in place; as many at a time as their Hessians fit into a gigabyte.

    Args:
        model: holds the layers.
        targets: by the name of the parameter the share of zeros, and (N, M) for a pattern or None.
        samples: what the Hessians are computed on; later layers see the outputs of pruned ones where they need a pass
            of their own.

    Returns:
        The names of the parameters that were not reached, and are left as they are.
    """
    owners = {name: name.rpartition(".")[0] for name in targets}
    source, missed = MomentSource(model, list(owners.values()), samples, _MAX_BYTES), []
    for name, (sparsity, pattern) in targets.items():
        moments = source.get(owners[name])
        if moments is None:
            missed.append(name)
            continue
        weight = model.get_parameter(name)
        layout = layout_of(model.get_submodule(owners[name]), weight)
        assert layout is not None, name
        hessian = layout.of_moment(moments.second, weight.shape)
        matrices = sparse_gpt(layout.to_matrices(weight.detach()), hessian, sparsity, pattern)
        check_finite(name, "sparsegpt", matrices)
        with torch.no_grad():
            weight.copy_(layout.from_matrices(matrices, weight.shape))
    return missed


def sparse_gpt(weight: Tensor, hessian: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Prunes matrices and corrects the weights that stay, so that W X changes little (Frantar & Alistarh 2023, alg. 1).

    We differ: inputs that are always zero are no special case. Damping leaves their weights among the first to go, and
    those that the sparsity does not ask for stay.

    Args:
        weight: `(groups, rows, columns)`.
        hessian: X X^T, `(groups, columns, columns)`, in any unit.
        sparsity: share of zeros in each block of 128 columns.
        pattern: N weights of any M successive ones in a row stay; None = free.

    Returns:
        The new weight, with exact zeros.
    """
    w = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    inverse = _inverse_factor(hessian).to(w)
    most, columns = most_dropped(sparsity, w.numel()), w.shape[2]
    kept = torch.ones_like(w, dtype=torch.bool)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = torch.zeros_like(w[:, :, first:last])
        if pattern is None:
            saliency = (w[:, :, first:last] / _diagonal(inverse, first, last)).square()
            drop = round(most * last / columns) - round(most * first / columns)
            smallest = saliency.flatten().topk(drop, largest=False).indices
            block = torch.ones_like(saliency, dtype=torch.bool).flatten().index_fill_(0, smallest, False)
            kept[:, :, first:last] = block.view_as(saliency)
        for column in range(first, last):
            if pattern is not None and column % pattern[1] == 0:
                end = column + pattern[1]
                saliency = (w[:, :, column:end] / _diagonal(inverse, column, end)).square()
                smallest = saliency.topk(pattern[1] - pattern[0], dim=2, largest=False).indices
                kept[:, :, column:end] = kept[:, :, column:end].scatter(2, smallest, False)
            error = w[:, :, column].masked_fill(kept[:, :, column], 0) / inverse[:, column, column, None]
            w[:, :, column:last] -= error[:, :, None] * inverse[:, None, column, column:last]
            errors[:, :, column - first] = error
        w[:, :, last:] -= errors @ inverse[:, first:last, last:]
    return (w * kept).to(weight.dtype)


def _diagonal(matrices: Tensor, first: int, last: int) -> Tensor:
    """`(groups, 1, last - first)`."""
    return matrices.diagonal(dim1=1, dim2=2)[:, None, first:last]


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped Hessian's inverse, `(groups, n, n)`; ten times the damping where it fails.

    The Hessian is taken relative to the mean diagonal of all groups, so that its unit does not count and weights of
    different groups compare. A group is damped by its own mean; one whose inputs are always zero becomes a multiple
    of the identity.
    """
    level = hessian.diagonal(dim1=1, dim2=2).mean()
    h = hessian / level if level > 0 else torch.zeros_like(hessian)
    own = h.diagonal(dim1=1, dim2=2).mean(1)
    damping = DAMPING * own.where(own > 0, 1.0)
    while True:
        damped = h + torch.diag_embed(damping[:, None].expand(h.shape[:2]))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.any():
            return upper
        damping = torch.where(failed > 0, 10 * damping, damping)
