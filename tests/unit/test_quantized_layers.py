"""Quantized layers of every type: what training computes, what the deployed form computes, and the input ranges."""

import copy

import pytest
import torch
from torch import nn

from pquant_lightning import QATCompression, compress_model, finalize
from pquant_lightning.core.affine import fake_quantize_activation
from pquant_lightning.methods.quantization._layers import RANGE_MOMENTUM

ALL_BITS = pytest.mark.parametrize("bits", range(2, 9))


def _train_form(layer, **options):
    """A model of that one layer, in training form."""
    return compress_model(nn.Sequential(copy.deepcopy(layer)), "qat", min_saving=0, **options)


def _rounded(weight, bits):
    """Per output channel, symmetric, in plain torch."""
    top = 2 ** (bits - 1) - 1
    scale = weight.detach().flatten(1).abs().amax(1).clamp_min(1e-30) / top
    scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight.detach() / scale).round().clamp(-top, top) * scale


def _reference(layer, inputs, bits, act_bits, act_range=None):
    """The ordinary layer with a rounded weight on rounded inputs."""
    rounded = copy.deepcopy(layer)
    rounded.weight.data = _rounded(layer.weight, bits)
    if act_bits < 16 and not isinstance(layer, nn.Embedding):
        inputs = fake_quantize_activation(inputs, *act_range, act_bits)
    return rounded(inputs)


@ALL_BITS
def test_training_form_is_the_layer_with_rounded_weight_and_inputs(quantizable, bits):
    layer, inputs = quantizable
    model = _train_form(layer, bits=bits)
    output = model(inputs)
    act_range = None if isinstance(layer, nn.Embedding) else torch.aminmax(inputs)
    assert type(model[0]) is not type(layer)
    torch.testing.assert_close(output, _reference(layer, inputs, bits, bits, act_range), rtol=1e-5, atol=1e-5)


@ALL_BITS
def test_finalized_output_equals_the_training_forms_eval_output(quantizable, bits):
    model = _train_form(quantizable.layer, bits=bits)
    model(quantizable.inputs)
    trained = model.eval()(quantizable.inputs)
    final = finalize(model)
    assert final[0].deployed
    assert not list(final.parameters())
    assert torch.equal(final(quantizable.inputs), trained)


@ALL_BITS
def test_codes_are_int8_and_fill_their_range(quantizable, bits):
    codes = finalize(_train_form(quantizable.layer, bits=bits))[0].codes
    top = 2 ** (bits - 1) - 1
    largest = codes.int().abs().flatten(1).amax(1)
    used = quantizable.layer.weight.flatten(1).any(1)  # a padding row is all zero
    assert codes.dtype == torch.int8
    assert codes.shape == quantizable.layer.weight.shape
    assert (largest[used] == top).all()
    assert (largest[~used] == 0).all()


def test_the_error_falls_with_every_bit(quantizable):
    errors = []
    for bits in range(2, 9):
        weight = _train_form(quantizable.layer, bits=bits)[0].dense_weight()
        errors.append((weight - quantizable.layer.weight).norm().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * quantizable.layer.weight.norm().item()


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 16), (16, 4), (3, 8)])
def test_weights_and_inputs_have_their_own_bits(weight_bits, act_bits):
    layer, inputs = nn.Linear(12, 10), torch.randn(5, 12)
    model = _train_form(layer, weight_bits=weight_bits, act_bits=act_bits)
    trained = model(inputs)
    expected = _reference(layer, inputs, weight_bits, act_bits, torch.aminmax(inputs))
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)
    assert (trained - layer(inputs)).abs().max() > 1e-3
    assert torch.equal(finalize(model)(inputs), model.eval()(inputs))
    assert ("act_range" in model[0].state_dict()) == (act_bits < 16)


def test_weight_gradient_passes_straight_through():
    layer, inputs = nn.Linear(12, 10), torch.randn(5, 12)
    model = _train_form(layer, bits=4)
    upstream = torch.randn(5, 10)
    model(inputs).backward(upstream)
    rounded_inputs = fake_quantize_activation(inputs, *torch.aminmax(inputs), 4)
    torch.testing.assert_close(model[0].weight.grad, upstream.T @ rounded_inputs)
    torch.testing.assert_close(model[0].bias.grad, upstream.sum(0))


def test_input_gradient_uses_the_rounded_weight_and_stops_outside_the_range():
    layer = nn.Linear(4, 3)
    model = _train_form(layer, bits=4)
    model(torch.tensor([[0.0, 1.0, 0.5, 0.2]]))
    inputs = torch.tensor([[-3.0, 0.5, 0.9, 7.0]], requires_grad=True)
    model.eval()(inputs).sum().backward()
    inside = torch.tensor([[0.0, 1.0, 1.0, 0.0]])
    torch.testing.assert_close(inputs.grad, _rounded(layer.weight, 4).sum(0) * inside)


class TestRange:
    @pytest.fixture
    def model(self):
        return _train_form(nn.Linear(4, 4))

    def test_starts_at_the_first_batch_and_moves_by_the_momentum(self, model):
        batches = [torch.randn(8, 4) * size for size in (1, 3, 0.5)]
        expected = torch.stack(torch.aminmax(batches[0]))
        for index, batch in enumerate(batches):
            model(batch)
            if index:
                expected += RANGE_MOMENTUM * (torch.stack(torch.aminmax(batch)) - expected)
            torch.testing.assert_close(model[0].act_range, expected, rtol=1e-6, atol=1e-7)

    def test_stands_still_in_eval(self, model):
        model(torch.randn(8, 4))
        before = model[0].act_range.clone()
        model.eval()(100 * torch.randn(8, 4))
        assert torch.equal(model[0].act_range, before)

    def test_an_unknown_range_passes_inputs_through(self, model):
        inputs = torch.randn(8, 4)
        expected = nn.functional.linear(inputs, _rounded(model[0].weight, 8), model[0].bias)
        assert model[0].act_range.tolist() == [torch.inf, -torch.inf]
        torch.testing.assert_close(model.eval()(inputs), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(finalize(model)(inputs), model(inputs))

    def test_is_known_again_after_a_load_and_unknown_after_loading_an_unknown_one(self, model):
        fresh = copy.deepcopy(model).eval()
        unknown = copy.deepcopy(model.state_dict())
        inputs = torch.randn(8, 4)
        model(inputs)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(inputs), model.eval()(inputs))
        fresh.load_state_dict(unknown)
        assert not torch.equal(fresh(inputs), model(inputs))

    def test_is_copied_by_finalize_not_shared(self, model):
        model(torch.randn(8, 4))
        final = finalize(model)
        before = final[0].act_range.clone()
        model.train()(100 * torch.randn(8, 4))
        assert torch.equal(final[0].act_range, before)

    def test_sees_what_the_layer_sees_under_autocast(self, model):
        inputs = torch.randn(8, 4)
        with torch.autocast("cpu", torch.bfloat16):
            model(inputs)
        torch.testing.assert_close(model[0].act_range, torch.stack(torch.aminmax(inputs)), rtol=1e-2, atol=1e-2)
        assert model[0].act_range.dtype == torch.float32

    def test_an_empty_batch_changes_nothing(self, model):
        model(torch.randn(8, 4))
        before = model[0].act_range.clone()
        assert model(torch.randn(0, 4)).shape == (0, 4)
        assert torch.equal(model[0].act_range, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_ranges_and_scales_stay_float32_when_the_model_is_cast(dtype):
    model = _train_form(nn.Linear(64, 64))
    model(torch.randn(8, 64))
    exact = model[0].act_range.clone()
    final = finalize(model).to(dtype)
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    for layer in (model[0], final[0]):
        assert layer.act_range.dtype == torch.float32
        assert torch.equal(layer.act_range, exact)
    assert final[0].scale.dtype == torch.float32
    assert final[0].codes.dtype == torch.int8
    inputs = torch.randn(3, 64, dtype=dtype)
    assert final(inputs).dtype == model.eval()(inputs).dtype == dtype


def test_bfloat16_trains_and_finalizes_to_the_same_output():
    model = _train_form(nn.Conv2d(4, 8, 3).bfloat16())
    inputs = torch.randn(2, 4, 6, 6, dtype=torch.bfloat16)
    model(inputs).sum().backward()
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert torch.equal(finalize(model)(inputs), model.eval()(inputs))


class TestEmbedding:
    @pytest.fixture
    def model(self):
        return _train_form(nn.Embedding(40, 6, padding_idx=3), bits=4)

    @pytest.mark.parametrize("indices", [torch.tensor(5), torch.tensor([[1, 3], [5, 5]]), torch.zeros(0).long()])
    def test_rows_are_those_of_the_rounded_table(self, model, indices):
        expected = _rounded(model[0].weight, 4)[indices]
        torch.testing.assert_close(model(indices), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(finalize(model)(indices), model(indices))

    def test_int32_indices(self, model):
        assert torch.equal(finalize(model)(torch.tensor([1, 5]).int()), model(torch.tensor([1, 5])))

    def test_the_padding_row_gets_no_gradient(self, model):
        model(torch.tensor([3, 5])).sum().backward()
        rows = model[0].weight.grad.abs().sum(1)
        assert rows[3] == 0
        assert rows[5] == 6

    def test_a_negative_index_is_an_error_in_both_forms(self, model):
        with pytest.raises(IndexError):
            model(torch.tensor([-1]))
        with pytest.raises(IndexError):
            finalize(model)(torch.tensor([-1]))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 3), "does not cover ConvTranspose2d"),
        (lambda: nn.Embedding(40, 8, max_norm=1.0), "max_norm"),
        (lambda: nn.Linear(64, 64).to(torch.complex64), "complex64"),
    ],
    ids=["conv_transpose", "max_norm", "complex"],
)
def test_layers_that_are_left_alone(make, reason):
    plan = QATCompression(min_saving=0).plan(nn.Sequential(make()))
    assert not plan.layers
    assert reason in plan.skipped[0].reason


def test_candidates_trade_bytes_for_loss():
    candidates = QATCompression().candidates("fc", nn.Linear(64, 48), None)
    losses = [c.loss for c in candidates]
    assert [c.options["bits"] for c in candidates] == [2, 3, 4, 6, 8]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-4
    assert all(c.macs == 64 * 48 for c in candidates)
