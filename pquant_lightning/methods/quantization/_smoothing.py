"""SmoothQuant: channels of large inputs are made smaller, and the weights that they meet larger."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.calibration import Samples, visit_inputs
from pquant_lightning.core.layer_adapter import channel_dim
from pquant_lightning.core.reduction import reduced_by_name
from pquant_lightning.methods.quantization._layers import QuantLayer
from pquant_lightning.methods.quantization._scaling import Link, reader_ranges, rescale


def smoothing_factor(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """What inputs are divided by, from the largest magnitudes per channel; 1 where either is zero.

    References:
        Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023,
        equation 4; `strength` is its alpha.
    """
    factor = inputs**strength / weights ** (1 - strength)
    return torch.where((inputs > 0) & (weights > 0), factor, torch.ones_like(factor))


def smooth(model: nn.Module, links: Sequence[Link], samples: Samples, strength: float) -> int:
    """Smooths the inputs of the layers that round theirs, where a link feeds them.

    Returns:
        The number of links.
    """
    chosen = [link for link in links if any(_rounds_inputs(model.get_submodule(name)) for name, _ in link.readers)]
    if not chosen:
        return 0
    largest = largest_inputs(model, [name for link in chosen for name, _ in link.readers], samples)
    for link in chosen:
        found = [largest[name].reshape(-1, repeats).amax(1) for name, repeats in link.readers]
        rescale(model, link, smoothing_factor(torch.stack(found).amax(0), reader_ranges(model, link), strength))
    return len(chosen)


def largest_inputs(model: nn.Module, names: Sequence[str], samples: Samples) -> dict[str, Tensor]:
    """Largest magnitude of each channel of the inputs of the named layers, float32 `(in,)`."""
    found: dict[str, Tensor] = {}

    def visit(name: str, x: Tensor) -> None:
        dim = channel_dim(model.get_submodule(name)) % x.dim()
        largest = x.abs().float().movedim(dim, 0).flatten(1).amax(1)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    visit_inputs(model, names, samples, visit)
    totals = reduced_by_name({name: [largest] for name, largest in found.items()}, names, samples, by="max")
    return {name: largest for name, (largest,) in totals.items()}


def _rounds_inputs(layer: Any) -> bool:
    return isinstance(layer, QuantLayer) and layer.spec["act"] is not None
