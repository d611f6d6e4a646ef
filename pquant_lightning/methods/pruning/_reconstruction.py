"""Repairs from data: layers that read fewer channels are fitted to their old outputs; batch norms see new inputs."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, run_samples
from pquant_lightning.core.errors import ModelError, named
from pquant_lightning.core.layer_adapter import NORMS
from pquant_lightning.core.moments import collect_moments
from pquant_lightning.core.samples import has_variance
from pquant_lightning.methods.pruning._sized import Removed, Units, places_of

log = logging.getLogger(__name__)

_DAMPING = 1e-4  # at least so much of the mean variance of the inputs that stay
_SCARCITY = 0.03  # so much of it where there are as many vectors as inputs: the fewer, the less a fit is to be trusted


def reconstruct(model: nn.Module, groups: Sequence[Units], removed: Removed, samples: Samples) -> list[str]:
    """Fits the weights and biases of the Linear and ungrouped Conv layers that lose inputs to their old outputs.

    With x the inputs, K those that stay and R those that go: W_K + W_R E[x_R x_K^T] (E[x_K x_K^T] + damping)^-1, each
    layer for itself, on the inputs that the unpruned model gives. Damping holds the weights that stay where they are.
    Of layers with a bias the moments are those around the mean, which the bias takes care of.

    Returns:
        The names of the layers.
    """
    lost: dict[str, list[int]] = {}
    for (tensor, dim), indices in places_of(groups, removed).items():
        name, _, attribute = tensor.rpartition(".")
        layer = model.get_submodule(name)
        fits = isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and getattr(layer, "groups", 1) == 1
        if attribute == "weight" and dim == 1 and fits:
            lost[name] = indices
    found = collect_moments(model, list(lost), samples)
    for name, moments in found.items():
        reader: Any = model.get_submodule(name)
        columns = reader.weight.detach().flatten(1).double().clone()
        kept = torch.ones(columns.shape[1], dtype=torch.bool, device=columns.device)
        kept.unflatten(0, (reader.weight.shape[1], -1))[lost[name]] = False
        moment = (moments.second if reader.bias is None else moments.covariance)[0]
        share = max(_DAMPING, _SCARCITY * int(kept.sum()) / moments.count)
        damping = share * float(moments.covariance[0].diagonal()[kept].mean())
        fitted = least_squares(columns, moment, kept, damping)
        if not fitted.isfinite().all():
            raise ModelError(f"The fit of {name!r} to its old outputs is not finite: look at its weights and inputs.")
        with torch.no_grad():
            reader.weight.copy_(fitted.reshape(reader.weight.shape))
            if reader.bias is not None:
                reader.bias.add_(((columns - fitted) @ moments.mean[0].double()).to(reader.bias))
    if missed := [name for name in lost if name not in found]:
        log.warning("Calibration never reached %s: not reconstructed.", named(missed))
    return list(found)


def least_squares(weight: Tensor, moment: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight that gives, from some inputs alone, nearly what it gave from all of them.

    Args:
        weight: float64 `(out, in)`.
        moment: second moment of the inputs, `(in, in)`.
        kept: bool `(in,)`, the inputs that stay; the other columns become zero.
        damping: added to the moment's diagonal, in its unit: it holds what stays to what it is.
    """
    moment, fitted = moment.double(), torch.where(kept, weight, 0.0)
    own, cross = moment[kept][:, kept], weight[:, ~kept] @ moment[~kept][:, kept]
    if damping > 0:  # else nothing that stays was ever anything but constant
        own.diagonal().add_(damping)
        fitted[:, kept] += torch.linalg.solve(own, cross.T).T
    return fitted


def _normalize_by_batch(module: nn.Module, args: Any) -> None:
    module.train(has_variance(module, args[0]))


def recalibrate(model: nn.Module, samples: Samples) -> None:
    """Gives batch norms the mean and variance of what they receive now, over all samples.

    A batch with a single value per channel has no variance: it is normalized by what is known until then. Norms that
    see no other batch, or none, keep their statistics.
    """
    norms: list[Any] = [
        module for module in model.modules() if isinstance(module, tuple(NORMS)) and module.running_mean is not None
    ]
    kept = [(norm, norm.momentum, {k: b.clone() for k, b in norm.named_buffers()}) for norm in norms]
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
        for norm, momentum, statistics in kept:
            norm.momentum = momentum
            if not int(norm.num_batches_tracked):
                for name, buffer in norm.named_buffers():
                    buffer.copy_(statistics[name])
