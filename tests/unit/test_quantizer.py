"""The quantizer against NumPy and the papers' formulas: codes, packing, scales, gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pquant_lightning.core.affine import (
    affine_codes,
    affine_scale,
    blocks,
    dequantize,
    fake_quantize_activation,
    fake_quantize_weight,
    learned_fake_quantize_activation,
    learned_fake_quantize_weight,
    make_grid,
    mse_scale,
    pack,
    packed_bytes,
    symmetric_codes,
    symmetric_scale,
    top_code,
    unblock,
    unpack,
)

few = settings(deadline=None, max_examples=50)
bits_ = st.integers(2, 8)
_finite = st.floats(-1e4, 1e4, width=32)
weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=_finite)
inputs = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=_finite)


class TestBlocks:
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_unblock_is_the_inverse(self, axis):
        weight = torch.randn(6, 4, 3)
        values = blocks(weight, axis)
        assert values.shape == {None: (1, 1, 72), 0: (6, 1, 12), 1: (4, 1, 18)}[axis]
        assert torch.equal(unblock(values, weight.shape, axis), weight)

    def test_groups_lie_along_the_inputs(self):
        weight = torch.arange(16.0).reshape(2, 8)
        assert blocks(weight, group_size=4)[1, 0].tolist() == [8.0, 9.0, 10.0, 11.0]


class TestWeights:
    @few
    @given(weights, bits_, st.sampled_from([None, 0, 1]))
    def test_scale_and_codes_are_those_of_numpy(self, array, bits, axis):
        values = blocks(torch.from_numpy(array), axis)
        scale = symmetric_scale(values, bits)
        rows = values.numpy()
        expected = np.maximum(np.abs(rows).max(-1) / np.float32(top_code(bits)), np.finfo(np.float32).tiny)
        assert np.array_equal(scale.numpy(), expected)
        codes = np.rint(rows * (np.float32(1) / expected)[..., None])
        assert np.array_equal(symmetric_codes(values, scale, bits).numpy(), codes)
        assert np.abs(codes).max() <= top_code(bits)

    @few
    @given(weights, bits_, st.sampled_from([None, 0, 1]))
    def test_fake_quantized_and_integer_forms_are_equal_bit_for_bit(self, array, bits, axis):
        weight = torch.from_numpy(array)
        values = blocks(weight, axis)
        scale = symmetric_scale(values, bits)
        codes = unblock(symmetric_codes(values, scale, bits), weight.shape, axis).to(torch.int8)
        assert torch.equal(dequantize(codes, scale, axis), fake_quantize_weight(weight, bits, axis))

    @few
    @given(weights, bits_)
    def test_error_is_at_most_half_a_scale_and_least_for_the_mse_scale(self, array, bits):
        weight = torch.from_numpy(array)
        values = blocks(weight)
        scale = symmetric_scale(values, bits)
        error = (fake_quantize_weight(weight, bits) - weight).abs().flatten(1)
        assert (error <= scale * (0.5 + 2**-14)).all()

        def squared(chosen):
            return (symmetric_codes(values, chosen, bits) * chosen[..., None] - values).square().sum(-1)

        assert (squared(mse_scale(values, bits)) <= squared(scale) * (1 + 1e-5)).all()

    def test_the_gradient_is_the_identity(self):
        weight, upstream = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
        fake_quantize_weight(weight, 3).backward(upstream)
        assert torch.equal(weight.grad, upstream)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_scaled_in_float32(self, dtype):
        weight = torch.randn(4, 64, dtype=dtype)
        rounded = fake_quantize_weight(weight, 8)
        assert rounded.dtype == dtype
        assert torch.equal(rounded, fake_quantize_weight(weight.float(), 8).to(dtype))


class TestPacking:
    @few
    @given(st.integers(2, 7), st.integers(1, 21), st.integers(1, 4), st.randoms(use_true_random=False))
    def test_unpack_is_the_inverse(self, bits, count, rows, random):
        low = -(2 ** (bits - 1))
        codes = torch.tensor([[random.randint(low, -low - 1) for _ in range(count)] for _ in range(rows)])
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8
        assert packed.shape == (rows, packed_bytes(count, bits))
        assert torch.equal(unpack(packed, count, bits), codes.to(torch.int8))

    def test_no_bit_is_wasted(self):
        assert [packed_bytes(64, bits) for bits in range(2, 8)] == [8 * bits for bits in range(2, 8)]


class TestActivations:
    @few
    @given(inputs, st.tuples(_finite, _finite).map(sorted), bits_)
    def test_codes_and_values_are_those_of_the_formula(self, array, limits, bits):
        x, top = torch.from_numpy(array), 2**bits - 1
        scale, zero_point = affine_scale(torch.tensor(limits[0]), torch.tensor(limits[1]), bits)
        grid = make_grid(scale, zero_point, bits)
        codes = affine_codes(x, grid.inverse, grid.zero_point, top)
        assert codes.min() >= 0
        assert codes.max() <= top
        expected = ((codes - zero_point) * scale).float()
        assert torch.equal(fake_quantize_activation(x, grid), expected)
        inside = (x >= min(limits[0], 0)) & (x <= max(limits[1], 0))
        assert ((expected - x).abs() <= scale * 0.51 + x.abs() * 2**-20)[inside].all()

    def test_zero_is_on_the_grid(self):
        grid = make_grid(*affine_scale(torch.tensor(-0.3), torch.tensor(1.7), 4), 4)
        assert fake_quantize_activation(torch.zeros(1), grid).item() == 0.0

    def test_the_gradient_stops_outside(self):
        x = torch.tensor([-3.0, 0.0, 0.5, 1.0, 7.0], requires_grad=True)
        fake_quantize_activation(x, make_grid(torch.tensor(1 / 15), torch.tensor(0.0), 4)).sum().backward()
        assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


class TestLearned:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_weight_gradients_are_those_of_the_paper(self, bits):
        torch.manual_seed(0)
        weight, upstream, top = torch.randn(6, 20, requires_grad=True), torch.randn(6, 20), top_code(bits)
        scale = (0.7 * mse_scale(blocks(weight.detach()), bits)).requires_grad_()
        learned_fake_quantize_weight(weight, scale, bits).backward(upstream)
        v = (weight / scale).detach()
        inside = v.abs() < top
        slope = torch.where(inside, v.round() - v, v.sign() * top)
        torch.testing.assert_close(weight.grad, upstream * inside)
        expected = (upstream * slope).sum(1, keepdim=True) / (20 * top) ** 0.5
        torch.testing.assert_close(scale.grad, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("rounding", [True, False])
    def test_activation_gradients_are_those_of_lsq_and_pact(self, rounding, sign):
        torch.manual_seed(0)
        x, upstream = torch.randn(200, requires_grad=True), torch.randn(200)
        scale, zero_point = (torch.tensor([value], requires_grad=True) for value in (0.2 * sign, 6.0))
        learned_fake_quantize_activation(x, scale, zero_point, 4, rounding).backward(upstream)
        v = (x / scale.abs()).detach()
        inside, codes = (v > -6) & (v < 9), v.round().clamp(-6, 9)
        slope = torch.where(inside, codes - v if rounding else torch.zeros_like(v), codes)
        share = (200 * 15) ** -0.5
        torch.testing.assert_close(x.grad, upstream * inside)
        expected = (upstream * slope).sum(0, keepdim=True) * share * sign
        torch.testing.assert_close(scale.grad, expected, rtol=1e-3, atol=1e-5)
        expected = -(upstream * ~inside).sum(0, keepdim=True) * 0.2 * share
        torch.testing.assert_close(zero_point.grad, expected, rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("of", ["weight", "input"])
    def test_scale_gradients_are_finite_differences_where_values_are_clipped(self, of, sign):
        """There the forward is linear in the scale, so that no straight-through convention is involved."""
        torch.manual_seed(0)
        x, upstream = 5 * torch.randn(40, dtype=torch.float64), torch.randn(40, dtype=torch.float64)
        x = x[x.abs() > 3].reshape(1, -1)
        upstream = upstream[: x.numel()].reshape(1, -1)

        def forward(scale):
            if of == "weight":
                return learned_fake_quantize_weight(x, scale[None], 4)
            return learned_fake_quantize_activation(x, scale, torch.tensor([6.0]), 4)

        at = torch.tensor([0.1 * sign], dtype=torch.float64, requires_grad=True)
        forward(at).backward(upstream)
        with torch.no_grad():
            difference = float(((forward(at + 1e-3) - forward(at - 1e-3)) * upstream).sum()) / 2e-3
        share = (x.numel() * (7 if of == "weight" else 15)) ** -0.5
        assert float(at.grad) == pytest.approx(difference * share, rel=1e-3)
