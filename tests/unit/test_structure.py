"""Sizes of a model: paths, runs of indices, tensors put in the place of others."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pquant_lightning.core.structure import (
    Resized,
    absolute_path,
    arrange,
    decode_indices,
    encode_indices,
    relative_path,
    replace_tensors,
    take,
    tensor_at,
)

names = st.lists(st.sampled_from(["a", "b", "block", "0", "1"]), max_size=4).map(".".join)


@given(names, names)
def test_a_path_leads_from_one_module_to_the_other(carrier: str, name: str) -> None:
    assert absolute_path(carrier, relative_path(carrier, name)) == name


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.lists(st.integers(0, 50), min_size=n, max_size=n), min_size=1)))
def test_runs_of_indices_come_back(units: list[list[int]]) -> None:
    assert decode_indices(encode_indices(units)) == units


def test_the_channels_of_a_layer_are_one_run() -> None:
    assert encode_indices([[i] for i in range(768)]) == {"width": 1, "runs": [[0, 1, 768]]}


def test_what_is_left_of_a_parameter_replaces_it_in_every_module() -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    other.weight = one.weight
    model = nn.ModuleList([one, other])
    kept = ((0, torch.tensor([0, 2])),)
    old, was = one.weight, one.weight.detach().clone()
    new = take({id(old): (old, kept)})
    replace_tensors(model, new)
    assert one.weight is other.weight
    assert torch.equal(one.weight, was[[0, 2]])
    assert isinstance(one.weight, nn.Parameter)
    momentum = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(Resized(old, one.weight, kept).follow(momentum), momentum[[0, 2]])


def test_a_group_gives_sizes_and_attributes_and_takes_them_back() -> None:
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    group = {
        "tensors": {"../1/weight": {"before": [2, 8], "now": [2, 3]}},
        "attributes": {"../1": {"in_features": {"before": 8, "now": 3}}},
    }
    arrange(model, "0", group, "now")
    assert (model[1].weight.shape, model[1].in_features) == ((2, 3), 3)
    arrange(model, "0", group, "before", skip=["1"])
    assert model[1].in_features == 3
    arrange(model, "0", group, "before")
    assert (model[1].weight.shape, model[1].in_features) == ((2, 8), 8)


def test_a_name_without_a_tensor_is_an_error() -> None:
    with pytest.raises(AttributeError):
        tensor_at(nn.Linear(2, 2), "in_features")
