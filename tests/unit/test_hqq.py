"""Half-quadratic grids: the error never grows, and outliers are forgiven."""

import pytest
import torch

from pquant_lightning.core.affine import blocks, mse_range, mse_scale
from pquant_lightning.methods.quantization._hqq import half_quadratic, lp_error


def heavy_tailed(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(16, 256, generator=generator)
    return blocks(values * (1 + 4 * (torch.rand(16, 256, generator=generator) > 0.97)), group_size=32)


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_lp_error_falls_in_every_block(bits, zero_point):
    values = heavy_tailed()
    start = mse_range(values, bits) if zero_point else (mse_scale(values, bits), None)
    scale, zero = half_quadratic(values, bits, zero_point)
    before, after = lp_error(values, *start, bits), lp_error(values, scale, zero, bits)
    assert (after <= before + 1e-5).all()
    assert after.sum() < 0.998 * before.sum()
    assert (zero is None) == (not zero_point)
    assert scale.shape == values.shape[:2]


def test_a_smaller_power_cares_less_for_outliers():
    values = heavy_tailed()
    body = values.abs() < 2

    def error(power):
        grid = half_quadratic(values, 3, True, power=power)
        return float(lp_error(values, *grid, 3, power=0.7).sum())

    assert error(0.7) < error(2.0)
    assert body.any()


def test_steps_end_early_where_nothing_gets_better():
    values = blocks(torch.tensor([[-1.0, 0.0, 1.0, 1.0]]))
    scale, zero = half_quadratic(values, 2, False)
    assert zero is None
    assert float(lp_error(values, scale, zero, 2)) == pytest.approx(0, abs=1e-6)


def test_blocks_that_hold_zeros_have_a_code_for_zero():
    values = heavy_tailed()
    held = values.clone()
    held[::2, :, ::8] = 0
    scale, zero = half_quadratic(held, 3, True)
    assert torch.equal(zero[::2], zero[::2].round())
    assert (zero[1::2] != zero[1::2].round()).any()
    assert zero.min() >= -4
    assert zero.max() <= 3
    free = half_quadratic(values, 3, True)
    assert torch.equal(scale[1::2], free[0][1::2])
    assert torch.equal(zero[1::2], free[1][1::2])
    start = lp_error(held, *mse_range(held, 3), 3)
    assert (lp_error(held, scale, zero, 3) <= start + 1e-5).all()
