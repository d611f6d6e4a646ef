"""How much the model's outputs suffer where one layer alone is factorized: what a shared budget must know."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pquant_lightning.core.calibration import Samples, first_samples
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.deploy import share_copy
from pquant_lightning.core.layer_adapter import as_torch
from pquant_lightning.core.moments import InputMoments
from pquant_lightning.core.output_error import OutputError
from pquant_lightning.core.plan import Candidate
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.methods.low_rank._fitting import fit_layer
from pquant_lightning.methods.low_rank._layers import find_low_rank_kind

PROBE_SAMPLES = 64
"""Samples, spread over the batches, on which the model is run once per layer."""


def output_weights(
    model: nn.Module,
    probes: Mapping[str, Candidate],
    moments_of: Callable[[str], InputMoments | None],
    samples: Samples,
    track: Callable[[Iterable[Any], str], Iterable[Any]],
) -> dict[str, float]:
    """By which factor the loss of a layer comes out of the model, measured layer by layer; the model is not changed.

    The outputs' error counts as ||o' - o||^2 / ||o - mean o||^2 with the mean over samples, averaged over what the
    model gives out.

    Args:
        model: uncompressed.
        probes: the choice with which each layer is tried.
        moments_of: the moments of a layer's inputs.
        samples: what the model is run on.
        track: shows progress.

    Returns:
        The outputs' error / the layer's loss, by layer name.
    """
    share = -(-PROBE_SAMPLES // len(samples.batches))
    few = Samples(tuple(first_samples(batch, share) for batch in samples.batches), samples.run)
    twin = share_copy(model)
    expected = OutputError(twin, few)
    weights = {}
    for name, probe in track(list(probes.items()), "low_rank: measuring"):
        original = twin.get_submodule(name)
        replace_layer(twin, name, _approximated(original, probe, moments_of(name)))
        error = expected.of(twin)
        replace_layer(twin, name, original)
        weights[name] = error / max(probe.loss, 1e-12)
    return weights


def _approximated(module: nn.Module, probe: Candidate, moments: InputMoments | None) -> nn.Module:
    """The layer with its low-rank weight as a dense one."""
    layer: Any = as_torch(module)
    kind = find_low_rank_kind(probe.options["kind"])
    (u, s, vh), shift, _ = fit_layer(layer, kind, probe.options["rank"], moments)
    twin = deep_copy(layer)
    with torch.no_grad():
        twin.weight.copy_(kind.from_matrix((u * s.unsqueeze(-2)) @ vh, tuple(twin.weight.shape[2:])))
        if shift is not None:
            twin.bias.add_(shift)
    return twin
