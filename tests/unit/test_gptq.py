"""Rounding by second moments against theory: the error of a layer's output."""

import pytest
import torch

from pquant_lightning.core.affine import blocks, dequantize, grid_codes, mse_range, mse_scale
from pquant_lightning.methods.quantization._adaround import adaround_codes
from pquant_lightning.methods.quantization._gptq import gptq_codes


def correlated(rows: int, inputs: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return mixed * torch.logspace(0, -2, inputs)


def grid(weight: torch.Tensor, bits: int, group_size: int | None, zero_point: bool):
    values = blocks(weight, group_size=group_size)
    return mse_range(values, bits) if zero_point else (mse_scale(values, bits), None)


def output_error(weight, rounded, x):
    return float(((rounded - weight) @ x.T).square().sum())


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_far_below_that_of_the_nearest_codes(bits, group_size, zero_point):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), correlated(500, 64)
    scale, zero = grid(weight, bits, group_size, zero_point)
    codes = gptq_codes(weight[None], (x.T @ x / 500)[None], scale[None], None if zero is None else zero[None], bits)[0]
    nearest = grid_codes(blocks(weight, group_size=group_size), scale, zero, bits).reshape(weight.shape)
    errors = [output_error(weight, dequantize(c, scale, 0, zero), x) for c in (codes, nearest)]
    assert errors[0] < 0.75 * errors[1]
    low = -(2 ** (bits - 1)) + (not zero_point)
    assert codes.min() >= low
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(codes, codes.round())


@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_learned_rounding_goes_up_or_down_and_never_grows_the_error(bits, zero_point):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), correlated(500, 64)
    scale, zero = grid(weight, bits, 16, zero_point)
    moment, zeros = (x.T @ x / 500)[None], None if zero is None else zero[None]
    codes = adaround_codes(weight[None], moment, scale[None], zeros, bits)[0]
    values = blocks(weight, group_size=16)
    nearest = grid_codes(values, scale, zero, bits).reshape(weight.shape)
    rows = [((dequantize(c, scale, 0, zero) - weight) @ x.T).square().sum(1) for c in (codes, nearest)]
    assert (rows[0] <= rows[1] * (1 + 1e-4)).all()
    assert rows[0].sum() < 0.9 * rows[1].sum()
    assert 0 < (codes - nearest).abs().max() <= 1
    one = adaround_codes(weight[None], torch.eye(64)[None], scale[None], zeros, bits)[0]  # nothing to make up for
    assert torch.equal(one, nearest)


def test_uncorrelated_inputs_give_the_nearest_codes():
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    scale, _ = grid(weight, 4, None, False)
    codes = gptq_codes(weight[None], torch.eye(32)[None], scale[None], None, 4)[0]
    assert torch.equal(codes, grid_codes(blocks(weight), scale, None, 4).squeeze(1))


def test_it_is_the_column_by_column_algorithm():
    """Blocks and batches of layers change the order of the arithmetic only."""
    torch.manual_seed(1)
    weights, x = torch.randn(2, 6, 70), [correlated(300, 70, seed).double() for seed in (1, 2)]
    moments = torch.stack([(v.T @ v / 300).float() for v in x])
    scales = torch.stack([mse_scale(blocks(w), 4) for w in weights])
    found = gptq_codes(weights, moments, scales, None, 4, act_order=False)
    for weight, moment, scale, codes in zip(weights, moments, scales, found, strict=True):
        w, h = weight.double().clone(), moment.double()
        h = h + 0.01 * h.diagonal().mean() * torch.eye(70)
        upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        for column in range(70):
            code = (w[:, column] / scale[:, 0]).round().clamp(-7, 7)
            error = (w[:, column] - code * scale[:, 0]) / upper[column, column]
            w[:, column:] -= error[:, None] * upper[column, column:]
            assert (code != codes[:, column]).float().mean() < 0.2  # float32 against float64 at a tie
    assert found.shape == weights.shape


def test_the_order_of_the_inputs_counts_and_needs_no_permutation():
    torch.manual_seed(0)
    weight, x = torch.randn(32, 64), correlated(500, 64).flip(1)  # the important inputs come last
    scale, _ = grid(weight, 3, 16, False)
    moment = (x.T @ x / 500)[None]
    errors = [
        output_error(weight, dequantize(gptq_codes(weight[None], moment, scale[None], None, 3, order)[0], scale), x)
        for order in (True, False)
    ]
    assert errors[0] < 0.8 * errors[1]


def test_few_samples_are_damped_and_damping_brings_the_nearest_codes():
    weight, x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), correlated(3, 64)
    scale, _ = grid(weight, 4, None, False)
    moment = (x.T @ x / 3)[None]
    nearest = grid_codes(blocks(weight), scale, None, 4).squeeze(1)
    differing = [
        int((gptq_codes(weight[None], moment, scale[None], None, 4, damping=d)[0] != nearest).sum())
        for d in (0.01, 1e3)
    ]
    assert differing[0] > 50 * (differing[1] + 0.1)
    still = gptq_codes(weight[None], torch.zeros(1, 64, 64), scale[None], None, 4)[0]  # inputs that are always zero
    assert torch.equal(still, nearest)


ROUNDINGS = (gptq_codes, adaround_codes)


@pytest.mark.parametrize("codes_of", ROUNDINGS)
@pytest.mark.parametrize("zero_point", [False, True])
def test_zeros_stay_and_the_other_weights_make_up_for_them(codes_of, zero_point):
    torch.manual_seed(0)
    x = correlated(500, 64)
    weight = torch.randn(24, 64).masked_fill_(torch.rand(24, 64) < 0.4, 0)
    scale, zero = grid(weight, 3, 16, zero_point)
    moment, zeros = (x.T @ x / 500)[None], None if zero is None else zero[None]
    codes = codes_of(weight[None], moment, scale[None], zeros, 3)[0]
    values = dequantize(codes, scale, 0, zero)
    nearest = dequantize(grid_codes(blocks(weight, group_size=16), scale, zero, 3).reshape(24, 64), scale, 0, zero)
    assert (values[weight == 0] == 0).all()
    assert output_error(weight, values, x) < 0.95 * output_error(weight, nearest, x)


@pytest.mark.parametrize("codes_of", ROUNDINGS)
def test_the_unit_of_the_inputs_does_not_count(codes_of):
    torch.manual_seed(0)
    weight, x = torch.randn(2, 8, 32), torch.stack([correlated(20, 32, seed) for seed in (0, 1)])
    x[:, :, 5] = 0  # an input that is always zero
    scale = torch.stack([mse_scale(blocks(w), 4) for w in weight])
    moment = x.mT @ x
    codes = codes_of(weight, moment, scale, None, 4)
    for unit in ([2.0**-60, 2.0**-60], [1.0, 2.0**30]):
        assert torch.equal(codes, codes_of(weight, moment * torch.tensor(unit)[:, None, None], scale, None, 4))


@pytest.mark.parametrize("codes_of", ROUNDINGS)
def test_moments_and_weights_in_double_precision(codes_of):
    torch.manual_seed(0)
    weight, x = torch.randn(1, 8, 40), correlated(200, 40)
    scale = mse_scale(blocks(weight[0]), 4)[None]
    moment = (x.double().T @ x.double())[None]
    codes = codes_of(weight, moment.float(), scale, None, 4)
    for double in (codes_of(weight, moment, scale, None, 4), codes_of(weight.double(), moment, scale, None, 4)):
        assert double.dtype == torch.float32
        assert (double != codes).float().mean() < 0.05  # ties
