"""Layers that give the output, and those a whole rank would leave too little of, are left alone unless named."""

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import CompressionMethodRegistry, compress_model
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import NothingToCompressError

METHODS = {
    "low_rank": ({"rank": 2}, {"energy": 0.5}, {"param_ratio": 0.5}),
    "factorization": ({"kind": "nmf", "rank": 2}, {"param_ratio": 0.5}, {"kind": "kronecker"}),
    "tensor_train": ({"rank": 2}, {"param_ratio": 0.5}),
    "cp": ({"rank": 4}, {"param_ratio": 0.5}),
}
ROWS = [(name, options) for name, rows in METHODS.items() for options in rows]
OUTPUT = "the output layer: name it in include"


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


def decisions(model: nn.Module, name: str, **options: object) -> tuple[set[str], dict[str, str]]:
    """What is changed, and why the others are not."""
    plan = CompressionMethodRegistry.get(name, {"min_saving": 0.0, **options}).plan(model)
    return {entry.name for entry in plan.layers}, {skip.name: skip.reason for skip in plan.skipped}


@pytest.mark.parametrize(("name", "options"), ROWS, ids=lambda value: str(value))
def test_the_output_layer_is_left_alone_unless_it_is_named(name: str, options: dict[str, object]) -> None:
    changed, reasons = decisions(mlp(), name, **options)
    assert changed == {"0", "2"}
    assert OUTPUT in reasons["4"]
    assert decisions(mlp(), name, **options, include=["4"])[0] == {"4"}
    assert decisions(mlp(), name, **options, include=["*"])[0] == {"0", "2", "4"}


def test_a_last_convolution_is_the_output_of_a_net_of_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3), nn.ConvTranspose2d(16, 8, 3))
    for name, options in (("tucker", {"rank": 4}), ("cp", {"rank": 4}), ("low_rank", {"rank": 4})):
        assert decisions(net, name, **options)[0] == {"0", "1"}
        assert "2" in decisions(net, name, **options, include=["*"])[0]


class TwoHeads(nn.Module):
    """Its last layer by definition is used first."""

    def __init__(self) -> None:
        super().__init__()
        self.boxes, self.classes = nn.Linear(48, 16), nn.Linear(48, 12)
        self.body, self.stem = nn.Linear(64, 48), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.body(self.stem(x))
        return {"boxes": self.boxes(hidden), "classes": self.classes(hidden)}


def test_data_show_what_gives_the_outputs() -> None:
    method = CompressionMethodRegistry.get("low_rank", {"rank": 4})
    samples = method.samples_of([torch.randn(4, 32)])
    with_data = method.plan(TwoHeads(), CompressionContext(by="test", samples=samples))
    assert {entry.name for entry in with_data.layers} == {"stem", "body"}
    assert {skip.name for skip in with_data.skipped if OUTPUT in skip.reason} == {"boxes", "classes"}


class Forecaster(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


def test_the_head_of_an_lstm_is_an_output_layer() -> None:
    assert "head" not in decisions(Forecaster(), "low_rank", param_ratio=0.5)[0]


def test_a_model_of_two_layers_is_changed_whole() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    assert decisions(model, "low_rank", rank=4)[0] == {"0", "2"}


@pytest.mark.parametrize("name", ["low_rank", "factorization"])
def test_a_rank_of_one_instead_of_two_is_no_half(name: str) -> None:
    """Half of a head of four classes is a rank of 1.94: a rank of 1 would keep a quarter."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 4))
    options = {"param_ratio": 0.5} if name == "low_rank" else {"param_ratio": 0.5, "kind": "nmf"}
    changed, reasons = decisions(model, name, **options)
    assert changed == {"0"}
    assert "would keep 26% of its weights instead of 50%" in reasons["2"]
    assert decisions(model, name, **options, include=["2"])[0] == {"2"}


def test_a_tied_output_is_changed_where_ties_are_asked_for() -> None:
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 48), nn.Linear(48, 32), nn.Linear(32, 32))
    model.append(nn.Linear(32, 64, bias=False))
    model[4].weight = model[0].weight
    assert decisions(model, "low_rank", rank=4)[0] == {"1", "2", "3"}
    assert decisions(model, "low_rank", rank=4, factorize_ties=True)[0] == {"0", "1", "2", "3", "4"}


def test_a_budget_leaves_the_output_layer() -> None:
    changed, reasons = decisions(mlp(), "low_rank", budget={"params": 0.5})
    assert changed
    assert OUTPUT in reasons["4"]
    method = CompressionMethodRegistry.get("low_rank", {})
    assert method.offers(mlp(), CompressionContext(by="test")).keys() == {"0", "2"}


def test_a_model_of_nothing_but_the_output_says_what_to_do() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Bilinear(8, 8, 8), nn.Bilinear(8, 8, 8), nn.Linear(32, 16))
    with pytest.raises(NothingToCompressError, match="name it in include"):
        compress_model(model, "low_rank", rank=2)
