"""Surgery: the new layer stands wherever the old one stood, and takes over everything that hung on it."""

import re

import pytest
import torch
from torch import nn

from pquant_lightning import LowRankCompression, QATCompression
from pquant_lightning.core.errors import ModelError, PQuantError
from pquant_lightning.core.surgery import get_layer, replace_layer

METHODS = [LowRankCompression(rank=4), QATCompression()]
both_methods = pytest.mark.parametrize("method", METHODS, ids=["low_rank", "qat"])


def _compressed(model, method):
    method.apply(model, method.plan(model))
    return model


class TwoPlaces(nn.Module):
    """One layer under two names in two parents."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
        self.decoder = nn.ModuleDict({"same": self.encoder[0]})

    def forward(self, x):
        return self.decoder["same"](self.encoder(x))


@both_methods
def test_a_layer_at_two_places_stays_one_layer(method):
    model = _compressed(TwoPlaces(), method)
    assert type(model.encoder[0]) is not nn.Linear
    assert model.decoder["same"] is model.encoder[0]


@both_methods
def test_a_layer_twice_in_one_parent_stays_one_layer(method):
    layer = nn.Linear(64, 64)
    model = _compressed(nn.Sequential(layer, nn.ReLU(), layer), method)
    assert type(model[0]) is not nn.Linear
    assert model[2] is model[0]


def test_replace_returns_the_old_layer():
    model = nn.Sequential(nn.Linear(2, 2))
    old, new = model[0], nn.Linear(2, 2)
    assert replace_layer(model, "0", new) is old
    assert model[0] is new


@pytest.mark.parametrize("training", [True, False])
@both_methods
def test_the_training_flag_is_that_of_the_old_layer(method, training):
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout())
    model[0].train(training)
    _compressed(model, method)
    assert all(module.training is training for module in model[0].modules())
    assert model[1].training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@both_methods
def test_the_dtype_is_that_of_the_old_layer(method, dtype):
    model = _compressed(nn.Sequential(nn.Linear(64, 64)).to(dtype), method)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.eval()(torch.randn(2, 64, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.5}])
def test_weights_on_meta_have_no_singular_values(options):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ModelError, match="'0'.*meta"):
        _compressed(model, LowRankCompression(**options))


@both_methods
@pytest.mark.parametrize("frozen", ["weight", "bias", "both", "none"])
def test_requires_grad_is_kept(method, frozen):
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.requires_grad_(frozen not in ("weight", "both"))
    model[0].bias.requires_grad_(frozen not in ("bias", "both"))
    weight, bias = model[0].weight.requires_grad, model[0].bias.requires_grad
    _compressed(model, method)
    flags = {name.rpartition(".")[2]: p.requires_grad for name, p in model.named_parameters()}
    assert flags == {"weight": weight, "bias": bias}


def test_parameters_of_equal_name_and_shape_are_the_same_objects():
    model = nn.Sequential(nn.Linear(64, 64))
    weight, bias = model[0].weight, model[0].bias
    _compressed(model, QATCompression())
    assert model[0].weight is weight
    assert model[0].bias is bias


def test_the_bias_of_a_low_rank_layer_is_the_same_object():
    model = nn.Sequential(nn.Linear(64, 64))
    bias = model[0].bias
    _compressed(model, LowRankCompression(rank=4))
    assert model[0].second.bias is bias


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight


def test_a_tie_survives_qat():
    model = _compressed(Tied(), QATCompression())
    assert (model.embed.kind, model.head.kind) == ("quant_embedding", "quant_linear")
    assert model.head.weight is model.embed.weight


def test_low_rank_leaves_tied_layers_alone_and_says_why():
    plan = LowRankCompression(rank=4).plan(Tied())
    assert not plan.layers
    reasons = {skip.name: skip.reason for skip in plan.skipped}
    assert re.fullmatch("shares .* with 'head'", reasons["embed"])
    assert re.fullmatch("shares .* with 'embed'", reasons["head"])


def _record(calls, *names):
    return lambda *args, **kwargs: calls.append((len(args), *names))


@both_methods
class TestHooks:
    """Hooks of the user go on seeing what they saw."""

    @pytest.fixture
    def model(self):
        return nn.Sequential(nn.Linear(64, 64))

    def run(self, model, method):
        _compressed(model, method)(torch.randn(2, 64, requires_grad=True)).sum().backward()

    def test_forward_hooks(self, model, method):
        calls = []
        model[0].register_forward_pre_hook(_record(calls, "pre"))
        model[0].register_forward_hook(_record(calls, "post"))
        self.run(model, method)
        assert calls == [(2, "pre"), (3, "post")]

    def test_a_forward_hook_still_changes_the_output(self, model, method):
        model[0].register_forward_hook(lambda module, args, output: output * 0)
        assert _compressed(model, method)(torch.randn(2, 64)).eq(0).all()

    def test_hooks_with_kwargs(self, model, method):
        calls = []
        model[0].register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
        model[0].register_forward_hook(lambda m, args, kwargs, output: calls.append(kwargs), with_kwargs=True)
        self.run(model, method)
        assert calls == [{}, {}]

    def test_full_backward_hooks(self, model, method):
        calls = []
        model[0].register_full_backward_hook(_record(calls, "backward"))
        model[0].register_full_backward_pre_hook(_record(calls, "backward_pre"))
        self.run(model, method)
        assert calls == [(2, "backward_pre"), (3, "backward")]

    def test_the_handle_still_removes_the_hook(self, model, method):
        calls = []
        handle = model[0].register_forward_hook(_record(calls, "post"))
        _compressed(model, method)
        handle.remove()
        model(torch.randn(2, 64))
        assert calls == []


def test_transformer_encoders_stop_reading_weights_directly():
    block = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(block, 2)})
    assert model["encoder"].use_nested_tensor
    replace_layer(model, "encoder.layers.0.linear1", nn.Linear(32, 64))
    assert not model["encoder"].use_nested_tensor


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(PQuantError, match="no layer named 'encoder.lin'.*Did you mean 'encoder.linear'"):
        get_layer(nn.ModuleDict({"encoder": nn.ModuleDict({"linear": nn.Linear(1, 1)})}), "encoder.lin")


def test_the_model_itself_is_not_replaced():
    with pytest.raises(PQuantError, match=r"Linear is itself the layer.*torch.nn.Sequential\(layer\)"):
        replace_layer(nn.Linear(2, 2), "", nn.Linear(2, 2))
