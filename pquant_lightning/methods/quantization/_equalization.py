"""Cross-layer equalization: weights of equal range per channel in the layer that writes and in those that read."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pquant_lightning.core.graph import norm_affine
from pquant_lightning.core.layer_adapter import NORMS
from pquant_lightning.methods.quantization._scaling import Link, output_ranges, reader_ranges, rescale

_ROUNDS = 20  # over all links; what one link balances, its neighbour disturbs
_CLOSE = 0.01  # relative change of a factor at which all is balanced


def equalizing_factor(written: Tensor, read: Tensor) -> Tensor:
    """s with `written / s == read * s` for ranges per channel; 1 where either is zero.

    References:
        Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, equation 11.
    """
    factor = (written / read).sqrt()
    return torch.where((written > 0) & (read > 0), factor, torch.ones_like(factor))


def equalize(model: nn.Module, links: Sequence[Link]) -> int:
    """Equalizes the ranges of weights over all links between layers; batch norms count as folded.

    Returns:
        The number of these links.
    """
    between = [link for link in links if _written(model, link) is not None]
    for _ in range(_ROUNDS):
        largest = 0.0
        for link in between:
            written = _written(model, link)
            assert written is not None
            factor = equalizing_factor(written, reader_ranges(model, link))
            rescale(model, link, factor)
            largest = max(largest, float(factor.log().abs().max()))
        if largest < _CLOSE:
            break
    return len(between)


def _written(model: nn.Module, link: Link) -> Tensor | None:
    """Range of the writer's weights per channel, its norm folded in; None for a norm without a layer to fold into."""
    writer: Any = model.get_submodule(link.writer)
    if link.layer is not None and type(writer) in NORMS:
        return output_ranges(model.get_submodule(link.layer)) * norm_affine(writer)[0].abs()
    return output_ranges(writer) if hasattr(writer, "kernel_size") or isinstance(writer, nn.Linear) else None
