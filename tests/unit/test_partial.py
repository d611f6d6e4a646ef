"""State dicts without the frozen weights: what is left out, what completes them, and what does not."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import compress_model, prepare
from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.core.partial import OMITTED, complete, fingerprint, omit_frozen
from tests.contract.table import same_state
from tests.models import MLP, ConvNet, built


def adapted(model: nn.Module, **options: Any) -> Any:
    model = compress_model(model, "lora", r=2, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return omit_frozen(model, model.state_dict())


def test_frozen_weights_are_left_out_and_the_rest_stays() -> None:
    model = adapted(ConvNet(), bias="lora_only")
    state = state_of(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert set(model.state_dict()) - set(state) == frozen
    assert "bn1.running_mean" in state
    assert set(state) - set(model.state_dict()) == {OMITTED}


def test_a_model_that_trains_as_a_whole_is_kept_as_a_whole() -> None:
    model = MLP()
    assert state_of(model).keys() == model.state_dict().keys()


@pytest.mark.parametrize("init", ["default", "pissa"])
def test_the_base_completes_it(init: str) -> None:
    model = adapted(built(ConvNet), init=init)
    fresh = prepare(built(ConvNet))
    fresh.load_state_dict(state_of(model))
    assert same_state(fresh, model)


def test_an_adapted_model_completes_it() -> None:
    model, other = adapted(built(MLP)), prepare(adapted(built(MLP), rank_pattern={"fc1": 3}))
    other.load_state_dict(state_of(model))
    assert same_state(other, model)


def test_integers_complete_it_where_the_adapter_stands_on_integers() -> None:
    base = compress_model(built(MLP), "ptq", bits=4, scheme="weight_only", min_saving=0.0)
    model = adapted(base)
    state = state_of(model)
    assert not [name for name in state if "codes" in name]
    fresh = prepare(compress_model(built(MLP), "ptq", bits=4, scheme="weight_only", min_saving=0.0))
    fresh.load_state_dict(state)
    assert same_state(fresh, model)
    with pytest.raises(
        CheckpointError, match=r"leaves out 'fc1.base.codes', which it expects in the base as 'fc1.codes'"
    ):
        prepare(built(MLP)).load_state_dict(state)


def test_what_another_method_has_made_of_a_weight_stays() -> None:
    model = adapted(compress_model(built(MLP), "low_rank", rank=2, include=["fc1"]))
    state = state_of(model)
    assert {"fc1.first.base.weight", "fc1.second.base.weight"} <= set(state)
    assert "fc2.base.weight" not in state
    fresh = prepare(built(MLP))
    fresh.load_state_dict(state)
    assert same_state(fresh, model)


def test_another_base_is_named() -> None:
    model, other = adapted(built(MLP)), prepare(built(MLP, seed=1))
    state = state_of(model)
    note = json.loads(bytes(state[OMITTED].tolist()))
    before = other.fc1.weight.clone()
    with pytest.raises(CheckpointError, match=rf"on a MLP with the base weights {note['base']}; this MLP has the base"):
        other.load_state_dict(state)
    assert torch.equal(other.fc1.weight, before)
    assert type(other.fc1) is nn.Linear


def test_a_damaged_note_is_an_error() -> None:
    state = state_of(adapted(built(MLP)))
    state[OMITTED] = state[OMITTED][:-5]
    with pytest.raises(CheckpointError, match="note of what the checkpoint leaves out is damaged"):
        complete(built(MLP), state)


def test_fingerprints_tell_values_shapes_and_names_apart() -> None:
    weight = torch.randn(40, 500)
    found = fingerprint({"w": weight})
    assert found == fingerprint({"w": weight.clone()}) == fingerprint({"w": weight.bfloat16()})
    assert len(found) == 16
    others = [{"v": weight}, {"w": weight.reshape(500, 40)}, {"w": weight * 1.1}, {"w": torch.randn(40, 500)}]
    assert len({found, *(fingerprint(other) for other in others)}) == 5
