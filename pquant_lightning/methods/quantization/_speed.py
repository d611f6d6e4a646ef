"""Layers that integers would make slower on this machine are put back into floating point, where that is asked for."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from pquant_lightning.core.calibration import Samples, from_rank_zero, visit_inputs
from pquant_lightning.core.layer_adapter import build_layer
from pquant_lightning.core.surgery import replace_layer
from pquant_lightning.methods.quantization._layers import QuantLayer
from pquant_lightning.methods.quantization._ties import shared_weights
from pquant_lightning.utils.benchmarking import measure

log = logging.getLogger(__name__)

_SECONDS = 0.3  # for each layer


def keep_faster(model: nn.Module, layers: Mapping[str, QuantLayer], samples: Samples) -> None:
    """Times the deployed form of each layer against its float form, in turns, and puts the slower ones back.

    Layers whose weight others have too, and those that the first batch does not reach, stay as they are.

    Args:
        model: holds the layers.
        layers: calibrated, by name.
        samples: the first batch gives the inputs.
    """
    shared = shared_weights(dict(model.named_modules()))
    inputs: dict[str, torch.Tensor] = {}

    def note(name: str, x: torch.Tensor) -> None:
        inputs.setdefault(name, x.clone())

    visit_inputs(model, list(layers), replace(samples, batches=samples.batches[:1]), note)
    times = {
        name: _relative_time(layers[name], x)
        for name, x in inputs.items()
        if id(layers[name].weight) not in shared and layers[name].deployable
    }
    slower = from_rank_zero({name: ratio for name, ratio in times.items() if ratio >= 1}, samples)
    for name in slower:
        replace_layer(model, name, _ordinary(layers[name]))
    if slower:
        shown = ", ".join(f"{name!r} ({ratio:.1f} of its time)" for name, ratio in slower.items())
        log.info("Left in floating point, where integers would be slower on this machine: %s", shown)


def _relative_time(layer: QuantLayer, x: torch.Tensor) -> float:
    """Time of the deployed form / time of the float form."""
    ordinary, deployed = _ordinary(layer), layer.finalized()
    with torch.no_grad():
        calls = {"float": lambda: ordinary(x), "deployed": lambda: deployed(x)}
        times = measure(calls, max_seconds=_SECONDS, min_round_ms=0.5)
    return times["deployed"].relative_to(times["float"]).median


def _ordinary(layer: QuantLayer) -> nn.Module:
    """The ordinary layer that a quantized one stands for, with the same parameters."""
    ordinary = build_layer(layer.spec["layer"], device="meta")
    for name, parameter in layer.named_parameters(recurse=False):
        if name in dict(ordinary.named_parameters()):
            setattr(ordinary, name, parameter)
    return ordinary.train(layer.training)
