"""The quantizer against NumPy and torch: codes, errors, gradients, and the ranges that are easy to get wrong."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pquant_lightning.core.affine import (
    affine_range,
    dequantize,
    fake_quantize_activation,
    fake_quantize_weight,
    symmetric_codes,
    symmetric_scale,
)

few = settings(deadline=None, max_examples=60)
bits_ = st.integers(2, 8)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
_finite = st.floats(-1e4, 1e4, width=32)
weights = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=_finite)
inputs = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=_finite)


def _numpy_weight(weight, bits, axis):
    """Scale `(channels,)` and codes of the published formula, in NumPy."""
    moved = np.moveaxis(weight, axis, 0)
    magnitude = np.abs(moved.reshape(len(moved), -1)).max(1)
    scale = np.maximum(magnitude / np.float32(2 ** (bits - 1) - 1), np.finfo(np.float32).tiny)
    codes = np.rint(moved / scale.reshape(-1, *[1] * (weight.ndim - 1)))
    return scale, np.moveaxis(codes, 0, axis)


class TestWeights:
    @few
    @given(weights, bits_, st.integers(0, 1))
    def test_scale_and_codes_are_those_of_numpy(self, array, bits, axis):
        scale = symmetric_scale(torch.from_numpy(array), bits, axis)
        codes = symmetric_codes(torch.from_numpy(array), scale, axis)
        expected_scale, expected_codes = _numpy_weight(array, bits, axis)
        assert scale.dtype == torch.float32
        assert codes.dtype == torch.int8
        assert np.array_equal(scale.numpy(), expected_scale)
        assert np.array_equal(codes.numpy(), expected_codes)

    @few
    @given(weights, bits_)
    def test_codes_stay_in_range_and_reach_its_end(self, array, bits):
        top = 2 ** (bits - 1) - 1
        codes = symmetric_codes(torch.from_numpy(array), symmetric_scale(torch.from_numpy(array), bits))
        largest = codes.int().abs().flatten(1).amax(1)
        normal = torch.from_numpy(array).abs().flatten(1).amax(1) > 1e-35
        assert (largest <= top).all()
        assert (largest[normal] == top).all()

    @few
    @given(weights, bits_)
    def test_error_is_at_most_half_a_scale(self, array, bits):
        weight = torch.from_numpy(array)
        scale = symmetric_scale(weight, bits).double().reshape(-1, *[1] * (weight.dim() - 1))
        error = (fake_quantize_weight(weight, bits).double() - weight.double()).abs()
        assert (error <= scale * (0.5 + 2**-15)).all()

    @few
    @given(weights, bits_, dtypes, st.integers(0, 1))
    def test_training_and_integer_form_are_equal_bit_for_bit(self, array, bits, dtype, axis):
        weight = torch.from_numpy(array).to(dtype)
        scale = symmetric_scale(weight, bits, axis)
        integer = dequantize(symmetric_codes(weight, scale, axis), scale, dtype, axis)
        trained = fake_quantize_weight(weight, bits, axis)
        assert trained.dtype == integer.dtype == dtype
        assert torch.equal(trained, integer)

    @few
    @given(weights, bits_)
    def test_rounding_twice_is_rounding_once(self, array, bits):
        once = fake_quantize_weight(torch.from_numpy(array), bits)
        torch.testing.assert_close(fake_quantize_weight(once, bits), once, rtol=1e-6, atol=0)

    @few
    @given(weights, bits_, dtypes)
    def test_gradient_is_the_identity(self, array, bits, dtype):
        weight = torch.from_numpy(array).to(dtype).requires_grad_()
        upstream = torch.randn(weight.shape, dtype=dtype)
        fake_quantize_weight(weight, bits).backward(upstream)
        assert torch.equal(weight.grad, upstream)

    def test_zero_channels_stay_zero(self):
        weight = torch.tensor([[0.0, 0.0], [3.0, -1.0]])
        scale = symmetric_scale(weight, 8)
        assert scale[0] > 0
        assert symmetric_codes(weight, scale).tolist() == [[0, 0], [127, -42]]
        assert fake_quantize_weight(weight, 8)[0].tolist() == [0.0, 0.0]

    def test_channels_do_not_influence_each_other(self):
        weight = torch.randn(3, 4)
        louder = weight * torch.tensor([[1.0], [1000.0], [1.0]])
        assert torch.equal(fake_quantize_weight(weight, 4)[[0, 2]], fake_quantize_weight(louder, 4)[[0, 2]])

    def test_half_precision_is_scaled_in_float32(self):
        weight = torch.randn(4, 64, dtype=torch.bfloat16)
        assert torch.equal(symmetric_scale(weight, 8), symmetric_scale(weight.float(), 8))
        rounded = fake_quantize_weight(weight, 8)
        error = (rounded.float() - weight.float()).abs()
        scale = symmetric_scale(weight, 8).unsqueeze(1)
        assert (error <= scale / 2 + rounded.float().abs() * 2**-8).all()


def _ranges():
    return st.tuples(_finite, _finite).map(sorted)


def _numpy_activation(x, low, high, bits):
    """Equation 1 of Jacob et al. 2018, in NumPy float32; the range is widened to hold zero."""
    top = np.float32(2**bits - 1)
    low, high = np.minimum(np.float32(low), 0), np.maximum(np.float32(high), 0)
    scale = np.maximum((high - low) / top, np.finfo(np.float32).tiny)
    zero_point = np.rint(-low / scale)
    with np.errstate(over="ignore"):
        codes = np.clip(np.rint(x / scale + zero_point), 0, top)
    return (codes - zero_point) * scale, codes


class TestActivations:
    @few
    @given(inputs, _ranges(), bits_)
    def test_values_are_those_of_numpy(self, array, bounds, bits):
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in bounds)
        result = fake_quantize_activation(torch.from_numpy(array), low, high, bits)
        assert np.array_equal(result.numpy(), _numpy_activation(array, *bounds, bits)[0])

    @few
    @given(inputs, bits_)
    def test_error_inside_the_range_is_at_most_half_a_scale(self, array, bits):
        x = torch.from_numpy(array)
        low, high = torch.aminmax(x)
        scale = affine_range(low, high, bits)[0].double()
        error = (fake_quantize_activation(x, low, high, bits).double() - x.double()).abs()
        assert (error <= scale * (0.5 + 2**-14)).all()

    @few
    @given(_ranges(), bits_)
    def test_zero_is_exact(self, bounds, bits):
        low, high = (torch.tensor(bound, dtype=torch.float32) for bound in bounds)
        scale, zero_point = affine_range(low, high, bits)
        assert scale > 0
        assert 0 <= zero_point <= 2**bits - 1
        assert zero_point == zero_point.round()
        assert fake_quantize_activation(torch.zeros(1), low, high, bits).item() == 0

    @few
    @given(bits_, st.integers(0, 2**16), st.floats(0.01, 100), st.integers(0, 255))
    def test_values_and_gradients_are_those_of_torch(self, bits, seed, step, offset):
        """Away from the rounding ties, where torch multiplies by a rounded 1 / scale."""
        generator = torch.Generator().manual_seed(seed)
        top = 2**bits - 1
        zero = min(offset, top)
        low, high = torch.tensor(-zero * step), torch.tensor((top - zero) * step)
        scale, zero_point = affine_range(low, high, bits)
        code = torch.randint(-3, top + 4, (50,), generator=generator)
        shift = torch.rand(50, generator=generator) * 0.8 - 0.4
        x = ((code - zero + shift) * scale).requires_grad_()
        upstream = torch.randn(50, generator=generator)
        ours = fake_quantize_activation(x, low, high, bits)
        theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, top)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(
            torch.autograd.grad(ours, x, upstream)[0], torch.autograd.grad(theirs, x, upstream)[0], rtol=0, atol=0
        )

    def test_gradient_stops_outside_the_range(self):
        x = torch.tensor([-5.0, -0.6, -0.4, 0.0, 1.3, 3.0, 3.4, 3.6, 50.0], requires_grad=True)
        result = fake_quantize_activation(x, torch.tensor(0.0), torch.tensor(3.0), bits=2)
        result.backward(torch.full_like(x, 2.0))
        assert result.tolist() == [0, 0, 0, 0, 1, 3, 3, 3, 3]
        assert x.grad.tolist() == [0, 0, 2, 2, 2, 2, 2, 0, 0]

    def test_the_range_gets_no_gradient(self):
        low, high = torch.tensor(-1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
        fake_quantize_activation(torch.ones(2, requires_grad=True), low, high, 8).sum().backward()
        assert low.grad is None
        assert high.grad is None

    @pytest.mark.parametrize("value", [5.0, -5.0, 1e-3])
    def test_a_constant_input_is_exact(self, value):
        x = torch.full((3,), value)
        torch.testing.assert_close(fake_quantize_activation(x, *torch.aminmax(x), 8), x, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_one_sided_range_uses_all_codes(self, sign):
        x = sign * torch.linspace(2, 10, 1000)
        scale, zero_point = affine_range(*torch.aminmax(x), 4)
        assert zero_point == (0 if sign > 0 else 15)
        assert scale.item() == pytest.approx(10 / 15)
        assert fake_quantize_activation(x, *torch.aminmax(x), 4).unique().numel() == 13

    def test_an_all_zero_range_gives_zeros_and_no_nan(self):
        zero = torch.tensor(0.0)
        result = fake_quantize_activation(torch.tensor([-100.0, 0.0, 1.0, 1e30]), zero, zero, 8)
        assert result.abs().max() < 1e-30

    def test_bfloat16_is_computed_in_float32(self):
        x = torch.randn(256, dtype=torch.bfloat16)
        low, high = torch.tensor(-2.0), torch.tensor(2.5)
        result = fake_quantize_activation(x, low, high, 8)
        assert result.dtype == torch.bfloat16
        assert torch.equal(result, fake_quantize_activation(x.float(), low, high, 8).bfloat16())
