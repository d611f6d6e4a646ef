"""Which batch norms can be folded, read from one recorded forward pass."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pquant_lightning import LowRankCompression
from pquant_lightning.core.calibration import Samples
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.graph import Graph, trace
from tests.models import ConvNet

IMAGES = torch.randn(4, 4, 6, 6)


def traced(model: nn.Module, x: Any = IMAGES) -> Graph:
    return trace(model, Samples((x,), lambda m, batch: m(*batch) if isinstance(batch, tuple) else m(batch)))


def pairs(model: nn.Module, x: Any = IMAGES) -> dict[str, str]:
    return traced(model, x).foldable_norms(model)


class Net(nn.Module):
    """A convolution and a norm; `between` does something with the convolution's output `y`, given the input too."""

    def __init__(self, between: Any, conv: nn.Module | None = None, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = conv or nn.Conv2d(4, 4, 3, padding=1)
        self.bn = norm or nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        return self.between(self, x)


def plain(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.bn(net.conv(x)))


PAIR = {"conv": "bn"}

FOLDABLE = {
    "plain": plain,
    "relu in place after the norm": lambda n, x: F.relu_(n.bn(n.conv(x))),
    "the input is used again": lambda n, x: n.bn(n.conv(x)) + x,
    "the norm's output is used twice": lambda n, x: (lambda y: y + y.mean())(n.bn(n.conv(x))),
    "the norm's output is returned": lambda n, x: n.bn(n.conv(x)),
    "its shape is read": lambda n, x: (lambda y: n.bn(y).reshape(y.shape[0], -1))(n.conv(x)),
    "python control flow": lambda n, x: n.bn(n.conv(x)) if float(x.sum()) != 0 else x,
    "a loop": lambda n, x: sum(F.relu(n.bn(y)) for y in [n.conv(x)]),
    "another branch reads another layer": lambda n, x: n.bn(n.conv(x)) + n.other(x),
    "the conv before writes to its input's copy": lambda n, x: n.bn(n.conv(n.other(x).clone().add_(1))),
}

NOT_FOLDABLE = {
    "relu between": lambda n, x: n.bn(F.relu(n.conv(x))),
    "residual of the conv's output": lambda n, x: (lambda y: n.bn(y) + y)(n.conv(x)),
    "another layer reads it": lambda n, x: (lambda y: n.bn(y) + n.other(y))(n.conv(x)),
    "its mean is read": lambda n, x: (lambda y: n.bn(y) * y.mean())(n.conv(x)),
    "indexed": lambda n, x: (lambda y: n.bn(y) + y[:, :1])(n.conv(x)),
    "the conv runs twice": lambda n, x: n.bn(n.conv(x)) + n.conv(x + 1),
    "the norm runs twice": lambda n, x: n.bn(n.conv(x)) + n.bn(x),
    "both run twice": lambda n, x: n.bn(n.conv(n.bn(n.conv(x)))),
    "the conv's output is returned": lambda n, x: (lambda y: (n.bn(y), y))(n.conv(x)),
    "the conv's output is returned in a dict": lambda n, x: (lambda y: {"y": y, "z": n.bn(y)})(n.conv(x)),
    "the norm does not follow": lambda n, x: n.conv(n.bn(x)),
    "the norm is not run": lambda n, x: n.conv(x),
    "a sum of two": lambda n, x: n.bn(n.conv(x) + n.other(x)),
    "changed in place between": lambda n, x: n.bn(n.conv(x).mul_(2)),
    "changed in place before": lambda n, x: (lambda y: (y.clamp_(0), n.bn(y))[1])(n.conv(x)),
    "a view of it is read": lambda n, x: (lambda y: n.bn(y) + y.view(y.shape).exp())(n.conv(x)),
    "transposed between": lambda n, x: n.bn(n.conv(x).transpose(2, 3)),
}


@pytest.mark.parametrize("case", FOLDABLE)
def test_what_is_folded(case: str) -> None:
    assert pairs(Net(FOLDABLE[case])) == PAIR


@pytest.mark.parametrize("case", NOT_FOLDABLE)
def test_what_is_not_folded(case: str) -> None:
    assert pairs(Net(NOT_FOLDABLE[case])) == {}


@pytest.mark.parametrize(
    ("conv", "norm", "found"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), PAIR),
        (nn.Conv2d(4, 8, 3, groups=4), nn.BatchNorm2d(8, affine=False), PAIR),
        (nn.ConvTranspose2d(4, 6, 3), nn.BatchNorm2d(6), PAIR),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), {}),
        (nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), {}),
        (nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4, track_running_stats=True), {}),
        (nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), {}),
        (nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4), {}),
        (nn.MaxPool2d(2), nn.BatchNorm2d(4), {}),
    ],
)
def test_kinds_of_layers(conv: nn.Module, norm: nn.Module, found: dict[str, str]) -> None:
    assert pairs(Net(plain, conv, norm)) == found


@pytest.mark.parametrize(
    ("shape", "layer", "norm", "found"),
    [
        ((4, 3), nn.Linear(3, 5), nn.BatchNorm1d(5), {"0": "1"}),
        ((4, 5, 3), nn.Linear(3, 7), nn.BatchNorm1d(5), {}),  # the norm's channels are not the layer's
        ((4, 7, 3), nn.Linear(3, 7), nn.BatchNorm1d(7), {}),  # nor here, where their numbers agree
        ((4, 3, 9), nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), {"0": "1"}),
        ((4, 3, 4, 4, 4), nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5), {"0": "1"}),
        ((4, 3, 9), nn.ConvTranspose1d(3, 5, 3), nn.BatchNorm1d(5), {"0": "1"}),
    ],
)
def test_dimensions(shape: tuple[int, ...], layer: nn.Module, norm: nn.Module, found: dict[str, str]) -> None:
    assert pairs(nn.Sequential(layer, norm), torch.randn(shape)) == found


def test_a_convolution_without_a_batch_dimension_is_not_mistaken() -> None:
    """`(channels, height, width)` out of Conv2d is `(batch, channels, length)` to BatchNorm1d."""
    net = Net(lambda n, x: n.bn(n.conv(x[0])), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm1d(6))
    assert pairs(net) == {}


def test_several_pairs_in_nested_modules() -> None:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    again = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    assert pairs(nn.Sequential(block, again)) == {"0.0": "0.1", "1.0": "1.1"}
    assert pairs(nn.Sequential(block, block)) == {}  # one block, used twice
    assert pairs(ConvNet(), ConvNet.inputs(4)) == {"conv1": "bn1", "conv2": "bn2"}


def test_a_low_rank_convolution_is_folded_into_its_second_factor() -> None:
    model = ConvNet().eval()
    small = LowRankCompression(rank=2, include=["conv1"], min_saving=0.0).compress(model)
    assert pairs(small, ConvNet.inputs(4)) == {"conv1.second": "bn1", "conv2": "bn2"}


class Backwards(nn.Module):
    """Defined last to first, and with a layer that is not run."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.skipped = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.stem = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.norm(self.stem(x)))
        return self.head(self.body(x).mean((2, 3)))


def test_the_order_is_that_of_execution() -> None:
    graph = traced(Backwards())
    assert graph.order == ["stem", "norm", "body.0", "body.1", "head"]  # each once, although body runs twice
    assert [name for name, _, _ in graph.calls].count("body.1") == 2


def test_the_data_flow_is_recorded() -> None:
    model = Net(plain)
    graph = traced(model)
    calls = {name: (inputs, outputs) for name, inputs, outputs in graph.calls}
    assert calls["bn"][0] == calls["conv"][1]
    names = [(op.name, op.module) for op in graph.operations]
    assert ("conv2d", "conv") in names
    assert ("relu", "") in names
    relu = next(op for op in graph.operations if op.name == "relu")
    assert relu.inputs == calls["bn"][1]
    assert set(relu.outputs) & set(graph.outputs)
    assert graph.shapes[relu.outputs[0]] == (2, 4, 6, 6)  # two of the four samples


def test_tracing_leaves_the_model_as_it_is() -> None:
    model = Net(plain).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    traced(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.bn.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_model_that_cannot_be_run() -> None:
    model = Net(plain)
    with pytest.raises(CalibrationError, match=r"Net cannot be run.*float32 \(2, 7, 6, 6\)"):
        traced(model, torch.randn(4, 7, 6, 6))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.overrides._get_current_function_mode_stack()
