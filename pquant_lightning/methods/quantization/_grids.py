"""The grid of a weight, as a spec says how it is found without data, and the codes nearest to the weight."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pquant_lightning.core.affine import grid_codes, mse_range, mse_scale, symmetric_scale
from pquant_lightning.methods.quantization._hqq import Grids, half_quadratic


class Rounded(NamedTuple):
    """A rounded weight: whole `codes`, and the grid, float32 `(channels, groups)`; `zero` is None where symmetric."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


def code_bits(spec: dict[str, Any]) -> int:
    """Bits of a weight's codes: those it is stored in, or as many as the spec says where the range is reduced.

    Specs of version 0.1 know no reduced range.
    """
    return int(spec.get("code_bits", spec["bits"]))


def weight_grid(values: Tensor, spec: dict[str, Any]) -> Grids:
    """The grid of blocks `(channels, groups, values)`: `range`, `zero_point` and the bits of codes of the spec."""
    bits = code_bits(spec)
    if values.is_meta:
        scale = values.new_empty(values.shape[:2])
        return scale, torch.empty_like(scale) if spec["zero_point"] else None
    if spec["range"] == "hqq":
        scale, zero = half_quadratic(values, bits, spec["zero_point"])
    elif spec["zero_point"]:
        scale, zero = mse_range(values, bits)
    else:
        return (mse_scale if spec["range"] == "mse" else symmetric_scale)(values, bits), None
    return scale, None if zero is None else zero.half().float()  # as it is stored


def nearest_codes(values: Tensor, grid: Grids, bits: int) -> Rounded:
    """The codes nearest to blocks `(channels, groups, values)`, shaped as they are."""
    return Rounded(grid_codes(values, *grid, bits), *grid)
