"""A scheduled method with a kind of its own, as a third party would write it: all of it is in this file."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import CompressedLayer, CompressionMethodRegistry, LayerMethod
from pquant_lightning.core.compression_method import CompressionContext, Stage
from pquant_lightning.core.plan import LayerPlan, Skip

KIND, METHOD = "toy_linear", "toy"


class ToyLinear(CompressedLayer, nn.Linear, stage=Stage.MASK):
    """A Linear whose first input column is zero from `end` on."""

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        return cls(**{key: value for key, value in spec["layer"].items() if key != "type"})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ToyMethod(LayerMethod):
    """Zeroes the first input column of every Linear once `end` is reached, and keeps what it was told.

    Args:
        end: progress of training at which the target is reached.
        min_saving: nothing gets smaller before the columns are removed, and this toy removes none.
    """

    end: float = 0.5
    min_saving: float = 0.0

    stage = Stage.MASK
    trains = True

    @property
    def completes_at(self) -> float:
        return self.end

    def plan_layer(self, name: str, layer: nn.Module, context: CompressionContext) -> dict[str, Any] | Skip:
        return {"kind": KIND} if isinstance(layer, nn.Linear) else Skip(name, "no Linear")

    def fill(self, new: Any, old: Any, plan: LayerPlan, context: CompressionContext) -> None:
        """The parameters are the old ones already."""

    def step(self, model: nn.Module, state: dict[str, Any], progress: float) -> None:
        state.setdefault("progress", []).append(progress)
        self._zero(model, state)

    def project(self, model: nn.Module, state: dict[str, Any]) -> None:
        state["projections"] = state.get("projections", 0) + 1
        self._zero(model, state)

    def _zero(self, model: nn.Module, state: dict[str, Any]) -> None:
        if state.get("progress", [0.0])[-1] >= self.end:
            with torch.no_grad():
                for layer in toy_layers(model):
                    layer.weight[:, 0] = 0.0


def toy_layers(model: nn.Module) -> list[ToyLinear]:
    return [module for module in model.modules() if isinstance(module, ToyLinear)]


@contextmanager
def registered() -> Iterator[None]:
    """The toy is known to the package inside of the block, and only there."""
    CompressedLayer.kinds[KIND], ToyLinear.kind = ToyLinear, KIND
    CompressionMethodRegistry.register(METHOD, ToyMethod)
    try:
        yield
    finally:
        del CompressedLayer.kinds[KIND], CompressionMethodRegistry._methods[METHOD]
