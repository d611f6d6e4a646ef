"""What all layers of this family share: parts that are ordinary layers, and the weight that they stand for."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from pquant_lightning.core._private import MODULE_HOOKS
from pquant_lightning.core.compressed_layer import CompressedLayer, Stage, weight_of
from pquant_lightning.core.layer_adapter import SUPPORTED, build_layer
from pquant_lightning.methods.tensor_networks._convs import is_transposed


class FactoredLayer(CompressedLayer, stage=Stage.FACTORIZE):
    """A chain of ordinary layers, `parts`, that stands for one layer: later methods see ordinary layers.

    The bias is that of the last part, or of the layer itself where the kind `owns_bias`.
    """

    owns_bias: ClassVar[bool] = False
    parts: nn.ModuleList

    @classmethod
    def from_spec(cls, spec: dict[str, Any], replaced: nn.Module | None) -> Self:
        layer = cls()
        layer.parts = nn.ModuleList(build_layer(part) for part in cls.part_specs(spec))
        if cls.owns_bias:
            bias = nn.Parameter(torch.empty(spec["layer"]["out_features"])) if spec["layer"]["bias"] else None
            layer.register_parameter("bias", bias)
        return layer

    @staticmethod
    def part_specs(spec: dict[str, Any]) -> list[dict[str, Any]]:
        """Structures of the parts."""
        raise NotImplementedError

    def set_weights(self, weights: Sequence[Tensor], bias: nn.Parameter | None) -> None:
        """Copies one weight into each part, in any shape of as many numbers; the bias stays the same `Parameter`."""
        for part, weight in zip(self.parts, weights, strict=True):
            own = part.weight
            assert isinstance(own, Tensor)
            own.copy_(weight.reshape(own.shape))
        if bias is not None:
            (self if self.owns_bias else self.parts[-1]).bias = bias

    def weights(self) -> list[Tensor]:
        """The weight of each part, or the one it stands for where a later method has replaced it."""
        return [weight_of(part) for part in self.parts]

    @property
    def weight(self) -> Tensor:
        """The weight of the layer this one stands for, computed from the parts; read-only."""
        return self.dense_weight()

    def macs_per_position(self) -> int:
        """Multiply-accumulates per output position (input position of a transposed convolution)."""
        specs, total = self.part_specs(self.spec), 0
        transposed = is_transposed(self.spec["layer"])
        for place, spec in enumerate(specs):
            around = specs[:place] if transposed else specs[place + 1 :]
            positions = math.prod(math.prod(other["stride"]) for other in around)
            weight = spec["in_channels"] * spec["out_channels"] // spec["groups"] * math.prod(spec["kernel_size"])
            total += positions * weight
        return total

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class FactoredConv(FactoredLayer):
    """A chain that stands for a convolution: its bias is that of the last part."""

    @property
    def bias(self) -> Tensor | None:
        """The bias of the layer this one stands for."""
        found: Tensor | None = self.parts[-1].bias  # type: ignore[assignment]
        return found


def plain_weights(parts: nn.ModuleList) -> list[Tensor] | None:
    """The weights of the parts if a forward may read them instead of calling the parts, else None.

    It may where every part is one of torch's own and no hook watches it. Parts that a later method has replaced, parts
    whose inputs are being observed, and all parts where a program is exported, are called one by one.
    """
    if torch.compiler.is_exporting():
        return None
    weights = []
    for part in parts:
        if type(part) not in SUPPORTED or any(getattr(part, hooks) for hooks in MODULE_HOOKS):
            return None
        weights.append(part.weight)
    return weights  # type: ignore[return-value]


def random_like(weight: Tensor, shapes: list[torch.Size], ranks: list[int]) -> list[Tensor]:
    """Normal values for the parts of a product in which every number has about the variance of the weight's.

    A number of the product is a sum over all ranks of products of one number of each part.
    """
    terms = 1
    for rank in ranks:
        terms *= rank
    std = float(weight.detach().float().std(correction=0) / terms**0.5) ** (1 / len(shapes))
    return [torch.randn(shape, dtype=torch.float32, device=weight.device) * std for shape in shapes]
