"""Factors that are kept balanced or orthonormal while they are trained."""

from typing import Any

import torch
from torch import nn

from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.optimizer import balance_factors, orthonormalize_factors

_RETRACTIONS = {"balanced": balance_factors, "orthonormal": orthonormalize_factors}


@torch.no_grad()
def retract_factors(model: nn.Module) -> None:
    """Moves the factors of each layer whose spec asks for it (`retract`); no layer's weight changes."""
    layers: list[Any] = [layer for layer in compressed_layers(model).values() if "retract" in layer.spec]
    for layer in layers:
        layer.set_factors(*_RETRACTIONS[layer.spec["retract"]](*layer.factors()))
