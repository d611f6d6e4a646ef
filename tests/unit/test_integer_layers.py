"""The deployed layers: integer products equal the dequantized ones, on every shape, after every kind of copy."""

import copy
import pickle

import pytest
import torch
from torch import nn

from pquant_lightning import compress_model, finalize
from pquant_lightning.core.deploy import count_params
from pquant_lightning.core.errors import ModelError
from pquant_lightning.core.layer_adapter import build_layer, layer_spec


def _layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {
            "linear": (nn.Linear(48, 40), (5, 48)),
            "linear without bias, 3-D": (nn.Linear(48, 40, bias=False), (2, 7, 48)),
            "conv1d": (nn.Conv1d(8, 16, 3, padding=2, dilation=2), (3, 8, 11)),
            "conv2d": (nn.Conv2d(8, 16, 3, stride=2, padding=1), (3, 8, 9, 9)),
            "conv2d grouped, same": (nn.Conv2d(8, 16, 3, padding="same", groups=4), (3, 8, 9, 9)),
            "conv2d depthwise": (nn.Conv2d(8, 8, 3, groups=8), (3, 8, 9, 9)),
        }


LAYERS = _layers()
OPTIONS = [{}, {"scheme": "dynamic"}, {"weight_bits": 4, "act_bits": 8}, {"weight_bits": 3, "act_bits": 6}]
every_layer = pytest.mark.parametrize("name", LAYERS)


def deployed(name, **options):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    return compress_model(nn.Sequential(layer), "ptq", train_loader=[x], min_saving=0.0, **options).eval(), x


def dequantized(model, x):
    """The same layer by plain torch: a gradient is asked for, which integers do not have."""
    return model(x.clone().requires_grad_()).detach()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@every_layer
def test_integer_products_equal_the_dequantized_ones(name, options):
    model, x = deployed(name, **options)
    assert model[0].spec["kernel"] == "integer"
    with torch.no_grad():
        found, alone = model(x), model(x[:1])
    torch.testing.assert_close(found, dequantized(model, x), rtol=1e-4, atol=1e-4)
    assert alone.shape[1:] == found.shape[1:]
    assert (found - LAYERS[name][0](x)).abs().max() > 1e-4  # something was rounded


@every_layer
def test_copies_compile_and_export(name):
    model, x = deployed(name)
    with torch.no_grad():
        expected = model(x)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for twin in twins:
            assert torch.equal(twin(x), expected)
        torch._dynamo.reset()  # the rows share one code object, whose recompilations are limited
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), expected, rtol=1e-5, atol=1e-5)
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), expected, rtol=1e-4, atol=1e-4)
    stored = {"codes", "scale", "bias", "act_grid", "output_range", "_extra_state"}
    assert {key.split(".")[-1] for key in model.state_dict()} <= stored


@every_layer
def test_loading_other_values_drops_what_was_prepared(name):
    first, x = deployed(name)
    layer, _ = LAYERS[name]
    other = compress_model(
        nn.Sequential(build_layer(layer_spec(layer))), "ptq", train_loader=[x], min_saving=0.0
    ).eval()
    with torch.no_grad():
        before, expected = first(x), other(x)
        first.load_state_dict(other.state_dict())
        assert not torch.equal(before, expected)
        assert torch.equal(first(x), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_weights_are_stored_in_their_bits(bits):
    model = compress_model(nn.Sequential(nn.Linear(64, 32)), "ptq", bits=bits, scheme="weight_only")
    assert model[0].codes.numel() * model[0].codes.element_size() == 64 * 32 * bits // 8
    assert model[0].weight_codes().dtype == torch.int8
    assert count_params(model) == 64 * 32 + 32


def test_an_integer_tensor_is_refused():
    model, _ = deployed("linear")
    with pytest.raises(ModelError, match="takes floating-point inputs, got torch.int64"):
        model(torch.ones(2, 48, dtype=torch.long))


def test_an_empty_batch_gives_an_empty_output():
    model, _ = deployed("linear")
    assert model(torch.randn(0, 48)).shape == (0, 40)


@pytest.mark.parametrize(("groups", "bits"), [(1, 4), (2, 4), (1, 8), (2, 8)])
def test_a_batch_norm_is_folded_exactly(groups, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, bias=False), nn.BatchNorm2d(8))
    data = torch.randn(64, 4, 7, 7)
    model.train()(2 * data + 1)
    model[1].weight.data = torch.linspace(-2, 2, 8)  # signs, and nearly zero
    trained = compress_model(model.eval(), "qat", train_loader=[data], bits=bits, min_saving=0.0)
    final = finalize(trained)
    assert final[1].kind == "folded_norm"
    with torch.no_grad():
        torch.testing.assert_close(final(data), trained.eval()(data), rtol=1e-4, atol=1e-4)
        fresh = compress_model(nn.Sequential(*copy.deepcopy(list(model))), "qat", min_saving=0.0)
        fresh.load_state_dict(final.state_dict())
        assert torch.equal(fresh.eval()(data), final(data))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bits", [3, 8])
def test_transposed_convolutions(groups, bits):
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, stride=2, groups=groups))
    x = torch.randn(4, 8, 5, 5)
    trained = compress_model(model, "qat", train_loader=[x], bits=bits, min_saving=0.0).eval()
    final = finalize(trained)
    assert final[0].spec["kernel"].startswith("dequantize: torch has no integer kernel")
    with torch.no_grad():
        torch.testing.assert_close(final(x), trained(x), rtol=1e-4, atol=1e-4)
        assert 0 < (final(x) - model(x)).norm() < (0.5 if bits == 3 else 0.05) * model(x).norm()


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv1d"])
def test_sums_that_32_bits_do_not_hold(conv, scheme):
    """All codes are the largest, so that the sums are: about 1.2 times 2**31, known without a kernel."""
    inputs = 160_000 if not conv else 80_000
    layer = nn.Conv1d(inputs, 8, 1, bias=False) if conv else nn.Linear(inputs, 8, bias=False)
    nn.init.constant_(layer.weight, 0.5)
    x = torch.full((2, inputs, 1) if conv else (2, inputs), 3.0)
    model = compress_model(nn.Sequential(layer), "ptq", train_loader=[x], scheme=scheme, correct_bias=False)
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, torch.full_like(found, 1.5 * inputs), rtol=1e-4, atol=0.0)
    assert model[0].spec["kernel"].startswith("dequantize: a sum of 80,000" if conv else "integer")
