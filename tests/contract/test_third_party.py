"""A third party's class of the specification's own shape: `__init__(config)`, `compress`, `get_compression_info`."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from pquant_lightning import CompressionCallback, CompressionMethod, CompressionMethodRegistry, compress_model
from tests.contract.table import output, same_state
from tests.models import MLP, built, fit, quiet_trainer


class Rounding(CompressionMethod):
    """Rounds the weights of the Linear layers to a number of decimals."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.decimals = config.get("decimals", 1)

    def compress(self, model: Any, train_loader: Any = None, val_loader: Any = None) -> Any:
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = module.weight.data.round(decimals=self.decimals)
        return model

    def get_compression_info(self, original_model: Any, compressed_model: Any) -> dict[str, Any]:
        return {"method": self.name, "decimals": self.decimals, "compression_ratio": 1.0}


@pytest.fixture
def name() -> Iterator[str]:
    """Registered under this name for one test."""
    CompressionMethodRegistry.register("rounding", Rounding)
    yield "rounding"
    del CompressionMethodRegistry._methods["rounding"]


def test_its_attributes_are_those_of_the_specification() -> None:
    method = Rounding({"decimals": 2})

    assert method.config == {"decimals": 2}
    assert method.name == "Rounding"
    assert method.decimals == 2
    assert Rounding({}).decimals == 1


@pytest.mark.parametrize("form", ["object", "name", "config"])
def test_compress_model_runs_it(name: str, form: str) -> None:
    model = built(MLP)
    expected = model.fc1.weight.round(decimals=2)

    if form == "object":
        small: Any = compress_model(model, Rounding({"decimals": 2}))
    elif form == "name":
        small = compress_model(model, name, decimals=2)
    else:
        small = compress_model(model, {"compression": {"methods": [name], name: {"decimals": 2}}})

    assert not same_state(small, model)
    assert small.fc1.weight.equal(expected)
    assert same_state(model, built(MLP))


def test_its_data_reach_it() -> None:
    seen = []

    class Calibrating(Rounding):
        def compress(self, model: Any, train_loader: Any = None, val_loader: Any = None) -> Any:
            seen.extend([train_loader, val_loader])
            return super().compress(model, train_loader, val_loader)

    compress_model(built(MLP), Calibrating({}), train_loader="train", val_loader="val")

    assert seen == ["train", "val"]


def test_it_reports_itself() -> None:
    model, method = built(MLP), Rounding({})

    info = method.get_compression_info(model, method.compress(model))

    assert info == {"method": "Rounding", "decimals": 1, "compression_ratio": 1.0}


def test_the_registry_makes_it_from_a_dict(name: str) -> None:
    method = CompressionMethodRegistry.get(name, {"decimals": 3})

    assert isinstance(method, Rounding)
    assert method.config == {"decimals": 3}


def test_it_follows_another_method_in_a_configuration(name: str) -> None:
    model = built(MLP)
    config = {"compression": {"methods": ["low_rank", name], "low_rank": {"rank": 2}, name: {"decimals": 1}}}

    small: Any = compress_model(model, config)

    assert small.fc1.first.weight.equal(small.fc1.first.weight.round(decimals=1))
    assert output(small, MLP.inputs()).isfinite().all()


def test_a_callback_explains_that_it_cannot_run_in_a_trainer(tmp_path: Path) -> None:
    model = built(MLP)

    with pytest.raises(ValueError, match=r"Rounding.*plan.*compress_model"):
        fit(quiet_trainer(tmp_path, [CompressionCallback(Rounding({}))]), model)

    assert same_state(model, built(MLP))
    assert "configure_model" not in model.__dict__
