"""An ordinary layer in a place where the model's own code makes one of another type, with other tensors."""

from typing import Any, Self

from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CARRIED, CompressedLayer, Stage
from pquant_lightning.core.layer_adapter import build_layer


class AdaptedLayer(CompressedLayer, kind="adapted_layer", stage=Stage.UNFUSE):
    """Holds the ordinary layer as `layer`, for any method to change, and says in its spec that it is one.

    Without it a file would hold, under the name of transformers' `Conv1D` say, a weight the other way round, which
    cannot be loaded, or, where it is square, is loaded as another one.
    """

    layer: nn.Module

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        new = cls()
        new.layer = build_layer(spec["layer"])
        return new

    def dense_weight(self) -> Tensor:
        weight = self.layer.dense_weight() if isinstance(self.layer, CompressedLayer) else self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        out: Tensor = self.layer(x, *args)
        return out

    def described(self) -> str:
        return f"in place of {self.spec['adapted']}"


def in_place_of_adapted(final: nn.Module, spec: dict[str, Any]) -> nn.Module:
    """The deployed form of a layer for a place where the model's own code makes an adapted type.

    Args:
        final: the deployed form; a compressed layer, which carries a spec, is returned as it is.
        spec: of the layer that has been deployed; its `adapted` names that type.
    """
    if isinstance(final, CompressedLayer):
        return final
    kept = {key: spec[key] for key in ("by", "layer", *CARRIED) if key in spec}
    new = CompressedLayer.build({"kind": AdaptedLayer.kind, **kept}, final)
    assert isinstance(new, AdaptedLayer)
    new.layer = final
    return new
