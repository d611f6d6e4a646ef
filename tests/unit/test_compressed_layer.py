"""Kinds describe themselves, and a state dict alone rebuilds a model; a file is never trusted."""

import copy
import json

import pytest
import torch
from torch import nn

from pquant_lightning import CompressedLayer, QATCompression, compress_model, finalize, prepare
from pquant_lightning.core.compressed_layer import (
    SPEC_VERSION,
    Stage,
    compressed_layers,
    decode_spec,
    read_specs,
)
from pquant_lightning.core.errors import CheckpointError, PQuantError


def _plain():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 32)))


def _stack():
    return compress_model(compress_model(_plain(), "low_rank", rank=4), "qat")


def _encode(spec):
    text = spec if isinstance(spec, str) else json.dumps(spec)
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_the_spec_in_the_state_dict_is_the_spec_of_the_layer():
    model = _stack()
    specs = read_specs(model.state_dict())
    assert specs == {name: layer.spec for name, layer in compressed_layers(model).items()}
    assert specs["0"]["version"] == SPEC_VERSION
    assert specs["0"]["layer"] == {"type": "Linear", "in_features": 64, "out_features": 48, "bias": True}


def test_specs_come_outermost_first():
    state = dict(reversed(_stack().state_dict().items()))
    depths = [name.count(".") for name in read_specs(state)]
    assert len(depths) == 6
    assert depths == sorted(depths)


def test_specs_below_a_prefix():
    state = nn.ModuleDict({"net": _stack(), "other": _stack()}).state_dict()
    assert list(read_specs(state, "net.")) == list(read_specs(_stack().state_dict()))


def test_layers_are_listed_outer_before_inner():
    model = _stack()
    assert list(compressed_layers(model, outermost=True)) == ["0", "2.0"]
    assert len(compressed_layers(model)) == 6


@pytest.mark.parametrize(
    "state",
    [{"counter": 1}, None, torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8), _encode("text"), _encode([1])],
)
def test_a_users_extra_state_is_no_spec(state):
    assert decode_spec(state) is None


def test_the_spec_does_not_change_with_the_dict_it_was_made_from():
    spec = {"kind": "low_rank_linear", "rank": 2, "layer": {"type": "Linear", "in_features": 4, "out_features": 4}}
    layer = CompressedLayer.build(spec, nn.Linear(4, 4))
    spec["layer"]["in_features"] = 99
    assert layer.spec["layer"]["in_features"] == 4


@pytest.mark.usefixtures("own_registries")
class TestKinds:
    def test_a_kind_is_registered_by_its_name(self):
        class Sized(CompressedLayer, nn.Linear, kind="sized", stage=Stage.MASK):
            @classmethod
            def from_spec(cls, spec, replaced):
                return cls(spec["in"], spec["out"])

        old = nn.Linear(3, 2)
        layer = CompressedLayer.build({"kind": "sized", "in": 3, "out": 2}, old)
        assert type(layer) is Sized
        assert layer.weight is old.weight
        assert layer.stage is Stage.MASK

    def test_a_name_belongs_to_one_kind(self):
        with pytest.raises(PQuantError, match="'quant_linear' is already taken by QuantLinear"):

            class Other(CompressedLayer, kind="quant_linear"):
                pass

    def test_an_unknown_kind_names_the_nearest(self):
        with pytest.raises(PQuantError, match="'qat_lineer'.*Did you mean 'quant_linear'"):
            CompressedLayer.build({"kind": "qat_lineer"}, nn.Linear(2, 2))

    def test_the_group_is_carried_to_the_layer_that_takes_the_place(self):
        layer = nn.Linear(64, 48)
        (entry,) = QATCompression(act_bits=16).plan(nn.Sequential(layer)).layers
        spec = {**entry.spec, "group": ["a", "b"]}
        first = CompressedLayer.build(spec, layer)
        without = {key: value for key, value in spec.items() if key != "group"}
        assert CompressedLayer.build(without, first).spec["group"] == ["a", "b"]
        assert first.finalized().spec["group"] == ["a", "b"]


class TestRebuild:
    def test_every_structure_loads_into_every_other(self):
        inputs = torch.randn(3, 64)
        forms = {
            "low_rank": compress_model(_plain(), "low_rank", rank=4),
            "qat": compress_model(_plain(), "qat"),
            "stack": _stack(),
            "final": finalize(_stack()),
        }
        for model in forms.values():
            model.eval()
        for source in forms.values():
            for target in [prepare(_plain()), *map(copy.deepcopy, forms.values())]:
                target.load_state_dict(source.state_dict())
                assert [layer.spec for layer in compressed_layers(target).values()] == [
                    layer.spec for layer in compressed_layers(source).values()
                ]
                assert torch.equal(target.eval()(inputs), source(inputs))

    def test_a_layer_that_fits_already_is_kept(self):
        model = _stack()
        layers = compressed_layers(model)
        model.load_state_dict(_stack().state_dict())
        assert all(compressed_layers(model)[name] is layer for name, layer in layers.items())

    def test_old_layers_in_optimizers_and_new_ones_have_the_same_parameters_where_they_fit(self):
        model = prepare(_plain())
        weight, bias = model[0].weight, model[0].bias
        model.load_state_dict(compress_model(_plain(), "qat").state_dict())
        assert model[0].weight is weight
        assert model[0].bias is bias


QAT_SPECS = {
    "kind_is_a_list": lambda s: s.update(kind=["quant_linear"]),
    "kind_is_none": lambda s: s.update(kind=None),
    "another_kind": lambda s: s.update(kind="int_linear"),
    "no_version": lambda s: s.pop("version"),
    "no_layer": lambda s: s.pop("layer"),
    "layer_is_text": lambda s: s.update(layer="Linear"),
    "unknown_argument": lambda s: s["layer"].update(rank=4),
    "device_that_is_there": lambda s: s["layer"].update(device="cpu"),
    "device_that_is_not_there": lambda s: s["layer"].update(device="cuda"),
    "no_bits": lambda s: s.pop("act_bits"),
    "bits_are_text": lambda s: s.update(act_bits="8"),
    "absurd": lambda s: s["layer"].update(in_features=10**40),
    "negative": lambda s: s["layer"].update(in_features=-1),
    "another_shape": lambda s: s["layer"].update(in_features=65),
    "tied_without_derived_tensors": lambda s: s.update(tied_to={"weight": "2.0.weight"}),
}
INT_SPECS = {
    "tied_to_is_a_list": lambda s: s.update(tied_to=["codes"]),
    "tied_to_a_list": lambda s: s.update(tied_to={"codes": ["2.0.codes"]}),
    "tied_to_another_shape": lambda s: s.update(tied_to={"codes": "2.0.codes"}),
    "tied_to_a_bias": lambda s: s.update(tied_to={"scale": "0.bias"}),
    "tied_to_a_method": lambda s: s.update(tied_to={"codes": "2.0.forward"}),
    "tied_over_a_method": lambda s: s.update(tied_to={"forward": "2.0.codes"}),
}
HOSTILE = [("qat", change) for change in QAT_SPECS.values()] + [("int", change) for change in INT_SPECS.values()]


@pytest.mark.parametrize(("form", "change"), HOSTILE, ids=[*QAT_SPECS, *INT_SPECS])
def test_a_hostile_spec_is_refused_and_changes_nothing(form, change):
    source = compress_model(_plain(), "qat")
    state = (source if form == "qat" else finalize(source)).state_dict()
    spec = decode_spec(state["0._extra_state"])
    change(spec)
    state["0._extra_state"] = _encode(spec)

    model = prepare(_plain())
    modules, before = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"ayer '0'.* checkpoint|checkpoint.* layer '0'"):
        model.load_state_dict(state)
    assert list(model.modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_deeply_nested_spec_is_no_spec_or_an_error():
    state = compress_model(_plain(), "qat").state_dict()
    state["0._extra_state"] = _encode("[" * 100_000)
    with pytest.raises((PQuantError, RuntimeError)):
        prepare(_plain()).load_state_dict(state)


@pytest.mark.parametrize(
    ("weight", "found"), [(torch.zeros(48, 10), r"shape \(48, 10\)"), ("text", "no tensor"), (None, "no tensor")]
)
def test_a_weight_that_is_not_what_the_spec_says(weight, found):
    state = {**compress_model(_plain(), "qat").state_dict(), "0.weight": weight}
    with pytest.raises(CheckpointError, match=rf"'0' calls for 'weight' of shape \(48, 64\), the file holds {found}"):
        prepare(_plain()).load_state_dict(state)
