"""Pruning from data: the norms of what each weight is multiplied with, and SparseGPT's corrected pruning."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pquant_lightning.core.calibration import Samples, reduced, visit_inputs
from pquant_lightning.core.layer_adapter import as_torch, build_layer, layer_spec
from pquant_lightning.core.moments import MomentSource

_MAX_BYTES = 2**30  # of the Hessians held at one time
_BLOCK = 128  # columns pruned before the others are corrected
_DAMPING = 0.01  # share of the Hessian's mean diagonal that is added to it


def covers(layer: nn.Module, criterion: str) -> bool:
    """Whether the criterion can be computed for this layer."""
    ordinary = as_torch(layer)
    if ordinary is not layer or isinstance(layer, nn.Embedding):
        return False
    return criterion == "wanda" or _is_matrix(layer)


def _is_matrix(layer: nn.Module) -> bool:
    plain = isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1
    return isinstance(layer, nn.Linear) or plain


def squared_input_norms(model: nn.Module, names: list[str], samples: Samples) -> dict[str, Tensor]:
    """For each weight of a layer the sum of squares of all inputs that it is multiplied with.

    It is the gradient, with respect to the weight, of the sum of the layer's outputs for squared inputs: one formula
    for linear layers and for convolutions with groups, strides and padding.

    Returns:
        float32, broadcastable to the weight, by layer name; layers that were not reached are missing.
    """
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        layer: Any = model.get_submodule(name)
        twin = build_layer(layer_spec(layer), bias=False, device="meta")  # without the hook that calls this
        weight = torch.zeros_like(layer.weight, dtype=torch.float32, requires_grad=True)
        with torch.enable_grad():
            total = functional_call(twin, {"weight": weight}, (x.float().square(),)).sum()
        (norms,) = torch.autograd.grad(total, weight)
        if torch.equal(norms, norms[:1].expand_as(norms)):
            norms = norms[:1]
        found[name] = found[name] + norms if name in found else norms

    visit_inputs(model, names, samples, visit)
    return {name: reduced(norms.contiguous(), samples) for name, norms in found.items()}


def prune_with_correction(model: nn.Module, targets: dict[str, tuple[float, Any]], samples: Samples) -> list[str]:
    """Prunes layers by SparseGPT, in place; as many at a time as their Hessians fit into a gigabyte.

    Args:
        model: holds the layers.
        targets: by layer name the share of zeros, and (N, M) for a pattern or None.
        samples: what the Hessians are computed on; later layers see the outputs of pruned ones where they need a pass
            of their own.

    Returns:
        The layers that were not reached, and are left as they are.
    """
    source, missed = MomentSource(model, list(targets), samples, _MAX_BYTES), []
    for name, (sparsity, pattern) in targets.items():
        moments = source.get(name)
        if moments is None:
            missed.append(name)
            continue
        weight: Any = model.get_submodule(name).weight
        rows = sparse_gpt(weight.detach().flatten(1), moments.second[0], sparsity, pattern)
        with torch.no_grad():
            weight.copy_(rows.reshape(weight.shape))
    return missed


def sparse_gpt(weight: Tensor, hessian: Tensor, sparsity: float, pattern: tuple[int, int] | None) -> Tensor:
    """Prunes a matrix and corrects the weights that stay, so that W X changes little (Frantar & Alistarh 2023, alg. 1).

    Args:
        weight: `(outputs, inputs)`.
        hessian: X X^T, `(inputs, inputs)`, at any scale.
        sparsity: share of zeros in each block of 128 columns.
        pattern: N weights of any M successive ones stay; None = free.

    Returns:
        The new weight, with exact zeros.
    """
    w, h = weight.float().clone(), hessian.clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(_DAMPING * h.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], _BLOCK):
        last = min(first + _BLOCK, w.shape[1])
        errors = torch.zeros_like(w[:, first:last])
        if pattern is None:
            saliency = (w[:, first:last] / inverse.diagonal()[first:last]).square()
            drop = round(sparsity * last * w.shape[0]) - round(sparsity * first * w.shape[0])
            smallest = saliency.flatten().topk(drop, largest=False).indices
            kept[:, first:last] = (
                torch.ones_like(saliency, dtype=torch.bool).flatten().index_fill(0, smallest, False).view_as(saliency)
            )
        for column in range(first, last):
            if pattern is not None and column % pattern[1] == 0:
                ahead = slice(column, column + pattern[1])
                saliency = (w[:, ahead] / inverse.diagonal()[ahead]).square()
                smallest = saliency.topk(pattern[1] - pattern[0], dim=1, largest=False).indices
                kept[:, ahead] = kept[:, ahead].scatter(1, smallest, False)
            error = w[:, column].masked_fill(kept[:, column], 0) / inverse[column, column]
            w[:, column:last] -= error[:, None] * inverse[column, column:last]
            errors[:, column - first] = error
        w[:, last:] -= errors @ inverse[first:last, last:]
    return (w * kept).to(weight.dtype)
