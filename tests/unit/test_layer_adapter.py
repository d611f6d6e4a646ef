"""Adapters: every supported type is described and built again; users' own types join; look-alikes are left alone."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils import weight_norm as hooked_weight_norm

from pquant_lightning import (
    LayerAdapter,
    LowRankCompression,
    QATCompression,
    compress_model,
    finalize,
    load_compressed,
    register_adapter,
    save_compressed,
)
from pquant_lightning.core.affine import fake_quantize_weight
from pquant_lightning.core.errors import ModelError, PQuantError
from pquant_lightning.core.layer_adapter import build_layer, layer_spec

ADAPTER = LayerAdapter("pytorch")


def _reasons(method, model):
    return {skip.name: skip.reason for skip in method.plan(model).skipped}


def test_spec_round_trip_builds_the_same_layer(case):
    spec = json.loads(json.dumps(layer_spec(case.layer)))
    built = build_layer(spec)
    assert type(built) is type(case.layer)
    assert layer_spec(built) == layer_spec(case.layer)
    assert not torch.equal(built.weight, case.layer.weight)
    built.load_state_dict(case.layer.state_dict())
    assert torch.equal(built(case.inputs), case.layer(case.inputs))


def test_info_describes_the_layer(case):
    info = ADAPTER.get_layer_info(case.layer)
    assert info["type"] == type(case.layer).__name__.lower()
    assert info["shape"] == tuple(case.layer.weight.shape)
    described = {key: value for key, value in info.items() if key not in ("type", "shape", "bias")}
    assert described
    assert described == {key: getattr(case.layer, key) for key in described}
    assert info.get("bias", False) == (getattr(case.layer, "bias", None) is not None)
    assert ADAPTER.is_compressible(case.layer)


def test_overrides_change_single_arguments():
    spec = layer_spec(nn.Conv2d(4, 8, 3, padding_mode="reflect", padding=1))
    built = build_layer(spec, out_channels=6, device="meta")
    assert built.weight.shape == (6, 4, 3, 3)
    assert built.weight.is_meta
    assert built.padding_mode == "reflect"
    assert spec["out_channels"] == 8


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.BatchNorm2d(3), nn.LSTMCell(4, 4), nn.Sequential(nn.Linear(2, 2))])
def test_other_modules_have_no_info(layer):
    assert not ADAPTER.is_compressible(layer)
    assert ADAPTER.get_layer_info(layer) is None


def test_replace_layer_puts_a_layer_in_a_nested_place():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    new = nn.Linear(4, 4)
    ADAPTER.replace_layer(model, "0.0", new)
    assert model[0][0] is new


class Doubling(nn.Linear):
    """A subclass whose forward differs: treating it as a Linear would change the output."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("method", [LowRankCompression(rank=4), QATCompression()], ids=["low_rank", "qat"])
def test_a_subclass_is_not_taken_for_its_base(method):
    model = nn.Sequential(Doubling(64, 64), nn.Linear(64, 64))
    assert not ADAPTER.is_compressible(model[0])
    compressed = method.compress(model)
    assert type(compressed[0]) is Doubling
    assert type(compressed[1]) is not nn.Linear
    assert f"no adapter for the type {__name__}.Doubling" in _reasons(method, model)["0"]


def _pruned():
    return prune.l1_unstructured(nn.Linear(64, 64), "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: parametrizations.weight_norm(nn.Linear(64, 64)), "parametrization"),
        (lambda: parametrizations.orthogonal(nn.Linear(64, 64)), "parametrization"),
        (lambda: hooked_weight_norm(nn.Linear(64, 64)), "hook"),
        (lambda: nn.utils.spectral_norm(nn.Linear(64, 64)), "hook"),
        (_pruned, "prune"),
    ],
    ids=["weight_norm", "orthogonal", "old_weight_norm", "old_spectral_norm", "prune"],
)
@pytest.mark.parametrize("method", [LowRankCompression(rank=4), QATCompression()], ids=["low_rank", "qat"])
def test_computed_weights_are_left_alone_with_the_reason(method, make, word):
    model = nn.Sequential(make(), nn.Linear(64, 64))
    plan = method.plan(model)
    assert [layer.name for layer in plan.layers] == ["1"]
    assert word in _reasons(method, model)["0"]
    method.apply(model, plan)
    assert isinstance(model[0], nn.Linear)
    assert model(torch.randn(2, 64)).isfinite().all()


def test_the_inside_of_a_parametrization_is_no_layer():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    assert list(_reasons(QATCompression(), model)) == ["0"]


@pytest.mark.parametrize(
    "method", [LowRankCompression(rank=64, min_saving=0), QATCompression()], ids=["low_rank", "qat"]
)
def test_a_pruned_bias_does_no_harm(method):
    model = nn.Sequential(nn.Linear(64, 64), prune.l1_unstructured(nn.Linear(64, 64), "bias", 0.5))
    inputs = torch.randn(3, 64)
    expected = model(inputs).detach()
    method.apply(model, method.plan(model))
    assert type(model[0]) is not nn.Linear
    torch.testing.assert_close(model.eval()(inputs), expected, rtol=0.05, atol=0.05)


def test_a_lazy_layer_is_an_error_that_says_what_to_do():
    with pytest.raises(ModelError, match="'1' is a lazy layer.*run one batch"):
        compress_model(nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(4)), "qat")


def test_an_excluded_lazy_layer_does_no_harm():
    model = nn.Sequential(nn.Linear(64, 64), nn.LazyLinear(4))
    assert QATCompression(exclude=["1"]).plan(model).layers[0].name == "0"


class Dense(nn.Module):
    """A user's layer that keeps its weight as (in, out)."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(n_in, n_out))
        self.offset = nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return x @ self.kernel + self.offset


def _to_linear(dense):
    linear = nn.Linear(*dense.kernel.shape)
    linear.weight = nn.Parameter(dense.kernel.detach().T.contiguous())
    linear.bias = dense.offset
    return linear


@pytest.fixture
def dense_adapter(own_registries):
    register_adapter(Dense, _to_linear)


@pytest.mark.usefixtures("dense_adapter")
@pytest.mark.parametrize("shape", [(48, 48), (48, 64), (64, 48)], ids=["square", "wide", "tall"])
class TestUsersLayer:
    """A square kernel has the shape of its transpose: only the values tell a wrong orientation."""

    def test_info_is_that_of_the_equivalent_layer(self, shape):
        info = ADAPTER.get_layer_info(Dense(*shape))
        assert (info["type"], info["shape"]) == ("linear", shape[::-1])

    def test_low_rank_at_full_rank_gives_the_same_output(self, shape):
        model, inputs = nn.Sequential(Dense(*shape)), torch.randn(5, shape[0])
        small = compress_model(model, "low_rank", rank=48, min_saving=0)
        assert small[0].kind == "low_rank_linear"
        torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-4)

    def test_qat_rounds_the_kernel_per_output(self, shape):
        model, inputs = nn.Sequential(Dense(*shape)), torch.randn(5, shape[0])
        trained = compress_model(model, "qat", weight_bits=4, act_bits=16, quantizer="ste")
        expected = inputs @ fake_quantize_weight(model[0].kernel.T, 4).T + model[0].offset
        assert trained[0].kind == "quant_linear"
        torch.testing.assert_close(trained(inputs), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(finalize(trained)(inputs), expected, rtol=1e-5, atol=1e-5)

    def test_save_and_load_into_the_users_model(self, shape, tmp_path):
        model, inputs = nn.Sequential(Dense(*shape)), torch.randn(5, shape[0])
        trained = compress_model(model, "qat", act_bits=16)
        path = save_compressed(trained, tmp_path / "model.safetensors")
        loaded = load_compressed(nn.Sequential(Dense(*shape)), path)
        assert torch.equal(loaded(inputs), finalize(trained)(inputs))

    def test_the_users_parameter_object_is_kept_where_the_adapter_shares_it(self, shape):
        model = nn.Sequential(Dense(*shape))
        assert compress_model(model, "qat", inplace=True)[0].bias is model[0].bias
        dense = Dense(*shape)
        assert compress_model(nn.Sequential(dense), "low_rank", rank=4, inplace=True)[0].second.bias is dense.offset

    def test_a_frozen_layer_stays_frozen(self, shape):
        model = nn.Sequential(Dense(*shape)).requires_grad_(False)
        for method in (QATCompression(), LowRankCompression(rank=4)):
            assert not any(p.requires_grad for p in method.compress(model).parameters())


@pytest.mark.usefixtures("own_registries")
def test_register_as_a_decorator():
    @register_adapter(Dense)
    def to_linear(dense):
        return _to_linear(dense)

    assert to_linear(Dense(2, 3)).weight.shape == (3, 2)
    assert ADAPTER.is_compressible(Dense(2, 3))


@pytest.mark.usefixtures("own_registries")
def test_an_adapter_must_give_an_ordinary_layer():
    register_adapter(Dense, lambda dense: nn.Sequential(_to_linear(dense)))
    with pytest.raises(PQuantError, match="adapter of Dense gave a Sequential; it must give one of Linear"):
        ADAPTER.get_layer_info(Dense(2, 2))


@pytest.mark.parametrize("thing", ["Dense", Dense(1, 1), int])
def test_adapters_are_for_module_classes(thing):
    with pytest.raises(PQuantError, match="takes a torch.nn.Module class"):
        register_adapter(thing, _to_linear)


def test_weights_of_a_container_are_named_and_no_adapter_is_asked_for():
    """`self.pos` of a whole model belongs to no layer: that the model has no adapter says nothing."""

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos = nn.Parameter(torch.zeros(4, 64))
            self.fc = nn.Linear(64, 64)

    reason = _reasons(LowRankCompression(rank=2), Classifier())["Classifier"]
    assert reason.startswith("the weights that it holds itself ('pos') belong to no layer and stay as they are")
