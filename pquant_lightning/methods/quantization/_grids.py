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


def weight_grid(values: Tensor, spec: dict[str, Any]) -> Grids:
    """The grid of blocks `(channels, groups, values)`: `range`, `bits` and `zero_point` of the spec."""
    if values.is_meta:
        scale = values.new_empty(values.shape[:2])
        return scale, torch.empty_like(scale) if spec["zero_point"] else None
    if spec["range"] == "hqq":
        scale, zero = half_quadratic(values, spec["bits"], spec["zero_point"])
    elif spec["zero_point"]:
        scale, zero = mse_range(values, spec["bits"])
    else:
        return (mse_scale if spec["range"] == "mse" else symmetric_scale)(values, spec["bits"]), None
    return scale, None if zero is None else zero.half().float()  # as it is stored


def nearest_codes(values: Tensor, grid: Grids, bits: int) -> Rounded:
    """The codes nearest to blocks `(channels, groups, values)`, shaped as they are."""
    return Rounded(grid_codes(values, *grid, bits), *grid)
