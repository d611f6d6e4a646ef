"""Where outputs, places of the kernel and inputs lie in a weight: one form for all types of layers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.layer_adapter import as_torch

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer is read as what its inputs are multiplied with.

    Attributes:
        groups: of a convolution, each with inputs and outputs of its own.
        inputs_first: the weight is (inputs, outputs / groups, ...), as that of a transposed convolution or of
            transformers' `Conv1D`; else (outputs, inputs / groups, ...).
        overlaps: each input meets the whole kernel, and outputs are sums over its places: of transposed convolutions.
    """

    groups: int = 1
    inputs_first: bool = False
    overlaps: bool = False

    def to_product(self, weight: Tensor) -> Tensor:
        """The weight as `(groups, outputs, places, inputs)`, outputs and inputs of one group."""
        parts = weight.reshape(self.groups, -1, weight.shape[1], weight.shape[2:].numel())
        return parts.permute(0, 2, 3, 1) if self.inputs_first else parts.permute(0, 1, 3, 2)

    def from_product(self, product: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_product`."""
        parts = product.permute(0, 3, 1, 2) if self.inputs_first else product.permute(0, 1, 3, 2)
        return parts.reshape(shape)

    def to_rows(self, weight: Tensor) -> Tensor:
        """The weight as `(outputs, inputs * places)`, all that one output is made of side by side."""
        return self.to_product(weight).transpose(2, 3).flatten(2).flatten(0, 1)

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_rows`."""
        places = shape[2:].numel()
        product = rows.reshape(self.groups, rows.shape[0] // self.groups, -1, places).transpose(2, 3)
        return self.from_product(product, shape)

    def to_matrices(self, weight: Tensor) -> Tensor:
        """The weight as `(groups, rows, columns)`: what each vector of `core.moments.input_rows` is multiplied with.

        The columns are the inputs, at one place of the kernel after the other.
        """
        product = self.to_product(weight)
        return product.flatten(1, 2) if self.overlaps else product.flatten(2)

    def from_matrices(self, matrices: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `to_matrices`."""
        places = shape[2:].numel()
        product = matrices.unflatten(1, (-1, places)) if self.overlaps else matrices.unflatten(2, (places, -1))
        return self.from_product(product, shape)

    def of_moment(self, moment: Tensor, shape: torch.Size) -> Tensor:
        """A second moment `(groups, n, n)` of `core.moments` in the order of the columns of `to_matrices`."""
        places = 1 if self.overlaps else shape[2:].numel()
        order = torch.arange(moment.shape[-1], device=moment.device).reshape(-1, places).mT.flatten()
        return moment[:, order][:, :, order]


def layout_of(module: nn.Module, weight: Tensor) -> Layout | None:
    """The layout of a module's own weight; None where an adapter gives a layer in which it lies in another way."""
    ordinary = as_torch(module)
    layer: Any = module if ordinary is None else ordinary
    if isinstance(layer, _CONV_TRANSPOSE):
        found = Layout(layer.groups, inputs_first=True, overlaps=True)
    else:
        found = Layout(layer.groups) if isinstance(layer, _CONV) else Layout()
    if ordinary is None or ordinary is module or ordinary.weight is weight:
        return found
    if weight.dim() == 2 and isinstance(ordinary, nn.Linear | nn.Embedding):
        return Layout(inputs_first=_is_turned(module, weight, ordinary))
    return found if ordinary.weight.shape == weight.shape else None


def _is_turned(module: nn.Module, weight: Tensor, ordinary: Any) -> bool:
    """Whether the equivalent of a module has its weight transposed, which the shape of a square one does not tell."""
    rows, columns = weight.shape
    if rows != columns or rows == 1 or weight.is_meta:
        return bool(ordinary.weight.shape != weight.shape)
    kept = weight.data
    try:
        weight.data = torch.zeros_like(kept).index_put_((torch.tensor(0), torch.tensor(1)), torch.ones_like(kept[0, 0]))
        probe: Any = as_torch(module)
        return bool(probe.weight[1, 0] == 1)
    finally:
        weight.data = kept
