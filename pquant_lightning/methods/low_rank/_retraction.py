"""Factors that are kept balanced or orthonormal while they are trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.optimizer import balance_factors, orthonormalize_factors
from pquant_lightning.core.plan import CompressionPlan, LayerPlan

_RETRACTIONS = {"balanced": balance_factors, "orthonormal": orthonormalize_factors}


def with_retraction(plan: CompressionPlan, how: str | None) -> CompressionPlan:
    """The plan with `retract` in the specs of its layers; the plan itself for None."""
    if how is None:
        return plan
    layers = tuple(LayerPlan(entry.name, {**entry.spec, "retract": how}, entry.scratch) for entry in plan.layers)
    return dataclasses.replace(plan, layers=layers)


@torch.no_grad()
def retract_factors(model: nn.Module, held: Callable[[Tensor], bool] = lambda _: True) -> None:
    """Moves the factors of each layer whose spec asks for it (`retract`); no layer's weight changes."""
    layers: list[Any] = [layer for layer in compressed_layers(model).values() if "retract" in layer.spec]
    for layer in layers:
        if not any(held(parameter) for parameter in layer.parameters()):
            continue
        layer.set_factors(*_RETRACTIONS[layer.spec["retract"]](*layer.factors()))
