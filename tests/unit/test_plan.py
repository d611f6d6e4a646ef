"""Plans are frozen data: printed, saved, edited, applied; what was computed on the way stays out of them."""

import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

from pquant_lightning import CompressionPlan, LowRankCompression, QATCompression
from pquant_lightning.core.errors import CheckpointError, PQuantError
from pquant_lightning.core.plan import LayerPlan, Skip


def _model():
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.Linear(32, 1))


@pytest.fixture
def plan():
    return LowRankCompression(energy=0.5).plan(_model())


def test_plan_of_a_model_names_layers_and_reasons(plan):
    assert [layer.name for layer in plan.layers] == ["0", "2"]
    assert [skip.name for skip in plan.skipped] == ["3"]
    assert plan.method == plan.by == "low_rank"


def test_json_round_trip_gives_an_equal_plan(plan):
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_scratch_is_kept_in_memory_only(plan):
    assert plan.layers[0].scratch is not None
    assert pickle.loads(pickle.dumps(plan)).layers[0] == plan.layers[0]
    assert pickle.loads(pickle.dumps(plan)).layers[0].scratch is None
    assert CompressionPlan.from_json(plan.to_json()).layers[0].scratch is None
    assert "scratch" not in repr(plan.layers[0])


def test_planning_leaves_the_model_untouched():
    model = _model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for method in (LowRankCompression(rank=4), LowRankCompression(energy=0.5), QATCompression(bits=4)):
        assert method.plan(model).layers
        assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear, nn.Linear]
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_saved_plan_does_what_the_fresh_one_does(plan):
    first, second = _model(), _model()
    second.load_state_dict(first.state_dict())
    method = LowRankCompression(energy=0.5)
    method.apply(first, method.plan(first))
    method.apply(second, CompressionPlan.from_json(method.plan(second).to_json()))
    inputs = torch.randn(3, 64)
    assert isinstance(first[0].first, nn.Linear)
    torch.testing.assert_close(first(inputs), second(inputs), rtol=1e-4, atol=1e-5)


def test_an_edited_plan_is_obeyed(plan):
    edited = json.loads(plan.to_json())
    edited["layers"][0]["spec"]["rank"] = 3
    model = _model()
    LowRankCompression(energy=0.5).apply(model, CompressionPlan.from_json(json.dumps(edited)).without("2"))
    assert model[0].first.out_features == 3
    assert type(model[2]) is nn.Linear


def test_without_moves_a_layer_to_those_left_alone(plan):
    fewer = plan.without("0")
    assert [layer.name for layer in fewer.layers] == ["2"]
    assert Skip("0", "taken out of the plan") in fewer.skipped
    assert len(plan.layers) == 2


def test_without_refuses_a_name_that_is_not_in_the_plan(plan):
    with pytest.raises(PQuantError, match="'00'"):
        plan.without("00")


def test_a_plan_for_another_model_is_refused_before_anything_changes(plan):
    model = nn.Sequential(nn.Linear(64, 48))
    with pytest.raises(PQuantError, match="no layer named '2'"):
        LowRankCompression().apply(model, plan)
    assert type(model[0]) is nn.Linear


def test_print_shows_choices_and_reasons(plan):
    text = str(plan)
    assert text.splitlines()[0] == "low_rank plan: 2 layers to change, 1 left alone"
    assert f"  0: kind=low_rank_linear, rank={plan.layers[0].spec['rank']}" in text
    assert "  3: left alone, " in text


@pytest.mark.parametrize("data", [LayerPlan("a", {}), Skip("a", "b"), CompressionPlan("m", "m", ())])
def test_plans_are_frozen(data):
    field = dataclasses.fields(data)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(data, field, "other")


@pytest.mark.parametrize(
    "text", ["", "not json", "[]", "3", "{}", '{"version": 1}', '{"version": 1, "layers": [{}], "skipped": []}']
)
def test_text_that_is_no_plan(text):
    with pytest.raises(CheckpointError, match="not a compression plan"):
        CompressionPlan.from_json(text)


def test_a_newer_plan_is_refused(plan):
    newer = {**json.loads(plan.to_json()), "version": 2}
    with pytest.raises(CheckpointError, match="version 2; this release reads version 1"):
        CompressionPlan.from_json(json.dumps(newer))
