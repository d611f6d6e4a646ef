"""An ordinary layer in a place where the model's own code makes one of another type, with other tensors."""

from typing import Any, Self

from torch import Tensor, nn

from pquant_lightning.core.compressed_layer import CARRIED, CompressedLayer, Stage, weight_of
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
        return weight_of(self.layer)

    @property
    def weight(self) -> Tensor:
        """The weight of the ordinary layer."""
        return self.dense_weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias of the ordinary layer; embeddings have none."""
        if "bias" not in self.spec["layer"]:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'bias'")
        found: Tensor | None = self.layer.bias  # type: ignore[assignment]
        return found

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
