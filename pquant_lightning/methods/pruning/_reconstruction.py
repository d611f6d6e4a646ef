"""Repairs from data: layers that read fewer channels are fitted to their old outputs; batch norms see new inputs."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.layer_adapter import NORMS
from pquant_lightning.core.moments import InputMoments, collect_moments
from pquant_lightning.methods.pruning._sized import Removed, Units, places_of

log = logging.getLogger(__name__)

_DAMPING = 1e-4  # of the mean of the second moment's diagonal


def reconstruct(model: nn.Module, groups: Sequence[Units], removed: Removed, samples: Samples) -> list[str]:
    """Fits the weights and biases of the Linear and ungrouped Conv layers that lose inputs to their old outputs.

    With x the inputs, 1 appended, and K the inputs that stay: W_K = (E[W x x_K^T]) (E[x_K x_K^T])^-1, each layer for
    itself, on the inputs that the unpruned model gives.

    Returns:
        The names of the layers.
    """
    lost: dict[str, list[int]] = {}
    for (tensor, dim), indices in places_of(groups, removed).items():
        name, _, attribute = tensor.rpartition(".")
        layer = model.get_submodule(name)
        fits = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) and getattr(layer, "groups", 1) == 1
        if attribute == "weight" and dim == 1 and fits:
            lost[name] = indices
    found = collect_moments(model, list(lost), samples)
    moments = {name: _with_constant(moments) for name, moments in found.items()}
    for name, moment in moments.items():
        conv: Any = model.get_submodule(name)
        kept = torch.ones(moment.shape[0], dtype=torch.bool)
        kept[:-1].unflatten(0, (conv.weight.shape[1], -1))[lost[name]] = False
        with torch.no_grad():
            fitted = least_squares(_with_bias(conv), moment, kept)
            conv.weight.copy_(fitted[:, :-1].reshape(conv.weight.shape))
            if conv.bias is not None:
                conv.bias.copy_(fitted[:, -1])
    if missed := [name for name in lost if name not in moments]:
        log.warning("Calibration never reached %s: not reconstructed.", ", ".join(missed))
    return list(moments)


def _with_constant(moments: InputMoments) -> Tensor:
    """The second moment of the inputs with a 1 appended, `(in + 1, in + 1)`."""
    mean, second = moments.mean[0], moments.second[0]
    above = torch.cat([second, mean[:, None]], 1)
    return torch.cat([above, torch.cat([mean, mean.new_ones(1)])[None]])


def _with_bias(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.float().flatten(1)
    bias = weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.float()
    return torch.cat([weight, bias[:, None]], 1)


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """The weight that gives, from some inputs alone, nearly what it gave from all of them.

    Args:
        weight: `(out, in)`.
        moment: second moment of the inputs, `(in, in)`.
        kept: bool `(in,)`, the inputs that stay; the other columns become zero.
    """
    cross, own = (weight.double() @ moment.double())[:, kept], moment.double()[kept][:, kept]
    own.diagonal().add_(_DAMPING * own.diagonal().mean())
    fitted = torch.zeros_like(weight)
    fitted[:, kept] = torch.linalg.solve(own, cross.T).T.to(weight.dtype)
    return fitted


def _normalize_by_batch(module: nn.Module, args: Any) -> None:
    module.train()


def recalibrate(model: nn.Module, samples: Samples) -> None:
    """Gives batch norms the mean and variance of what they receive now, over all samples."""
    norms: list[Any] = [
        module for module in model.modules() if isinstance(module, tuple(NORMS)) and module.running_mean is not None
    ]
    kept = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
    handles = [norm.register_forward_pre_hook(_normalize_by_batch) for norm in norms]
    try:
        for _ in run_samples(model, samples):
            pass
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in kept:
            norm.momentum = momentum
