"""Factors moved between layers: the float model computes the same, and its eight-bit form loses less."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F

from pquant_lightning import PTQCallback, PTQCompression, compress_model, finalize, load_compressed
from pquant_lightning.core.calibration import Samples, run_forward
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError
from pquant_lightning.core.graph import trace
from pquant_lightning.methods.quantization._equalization import equalize, equalizing_factor
from pquant_lightning.methods.quantization._scaling import Link, find_links, output_ranges, reader_ranges, rescale
from tests.models import MLP, fit, quiet_trainer


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise, with batch norms; the range of channels spreads over two decades."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.expand, self.bn1 = nn.Conv2d(4, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)
        self.project = nn.Conv2d(32, 8, 1)
        self.head = nn.Linear(8 * 16, 10)
        spread = torch.logspace(-1, 1, 32)
        with torch.no_grad():
            self.bn1.weight.copy_(spread[torch.randperm(32)])
            self.bn2.weight.copy_(spread[torch.randperm(32)])
            for norm in (self.bn1, self.bn2):
                norm.running_mean.normal_(0, 0.1)
                norm.running_var.uniform_(0.5, 2)
                norm.bias.normal_().mul_(norm.weight)
            self.depthwise.weight.div_(self.bn1.weight.reshape(-1, 1, 1, 1))
            self.project.weight.div_(self.bn2.weight.reshape(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.expand(x)))
        x = F.leaky_relu(self.bn2(self.depthwise(x)), inplace=True)
        return self.head(F.max_pool2d(F.relu(self.project(x)), 2).flatten(1))


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def links_of(model: nn.Module, x: torch.Tensor) -> list[Link]:
    return find_links(model.eval(), trace(model, Samples((x,), run_forward)))


def decibels(small: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    """Signal to quantization noise of the output."""
    with torch.no_grad():
        expected = model(x)
        return float(10 * torch.log10(expected.square().sum() / (small(x) - expected).square().sum()))


def check_exact(model: nn.Module, x: torch.Tensor, links: list[Link]) -> None:
    """Random factors at every link leave the output as it is."""
    model = copy.deepcopy(model.eval())
    with torch.no_grad():
        expected = model(x)
        for link in links:
            writer: Any = model.get_submodule(link.writer)
            channels = getattr(writer, "out_channels", None) or getattr(writer, "out_features", len(writer.weight))
            before = writer.weight.clone()
            rescale(model, link, torch.rand(channels) * 3 + 0.2)
            assert not torch.equal(writer.weight, before)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_the_links_of_a_separable_net() -> None:
    model, x = Separable(), images(2, 0)
    links = links_of(model, x)
    assert links == [
        Link("bn1", "expand", (("depthwise", 1),)),
        Link("bn2", "depthwise", (("project", 1),)),
        Link("project", None, (("head", 16),)),
    ]
    check_exact(model, x, links)


class Conv(nn.Module):
    """A writer and a reader of any type around a function."""

    def __init__(self, first: nn.Module, second: nn.Module, between: Any) -> None:
        super().__init__()
        self.first, self.second, self.between = first, second, between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.between(self.first(x)))


class OwnNorm(nn.Module):
    """An RMS norm as transformers has it; `added` to its weight as in Gemma."""

    def __init__(self, added: float = 0.0) -> None:
        super().__init__()
        self.weight, self.added = nn.Parameter(torch.rand(16) + 0.5), added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight + self.added if self.added else self.weight
        return weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


IMAGE, VECTOR = torch.randn(2, 4, 9, 9), torch.randn(2, 5, 16)
EXACT: dict[str, tuple[nn.Module, nn.Module, Any, torch.Tensor]] = {
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 12, 3, groups=4), F.relu, IMAGE),
    "depthwise, more outputs": (nn.Conv2d(4, 8, 1), nn.Conv2d(8, 16, 3, groups=8), F.relu, IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ConvTranspose2d(6, 8, 3, groups=2), torch.relu, IMAGE),
    "padded by reflection": (nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 3, padding=1, padding_mode="reflect"), F.relu, IMAGE),
    "pooled": (nn.Conv2d(4, 6, 1), nn.Linear(6, 3), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), IMAGE),
    "mean": (nn.Conv2d(4, 6, 1), nn.Linear(6, 3), lambda x: x.relu().mean((2, 3)), IMAGE),
    "linear": (nn.Linear(16, 8), nn.Linear(8, 4), nn.LeakyReLU(inplace=True), VECTOR),
    "layer norm": (nn.LayerNorm(16), nn.Linear(16, 4), nn.Dropout(0.5), VECTOR),
    "a norm of another package": (OwnNorm(), nn.Linear(16, 4), nn.Identity(), VECTOR),
    "rms norm": (nn.RMSNorm(16), nn.Linear(16, 4), nn.Identity(), VECTOR),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_kind_of_link_is_exact(name: str) -> None:
    first, second, between, x = EXACT[name]
    model = Conv(first, second, between)
    links = links_of(model, x)
    assert [link.writer for link in links] == ["first"]
    check_exact(model, x, links)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.second(x)


class ReadElsewhere(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)) + self.first.weight.sum()


class Twice(Residual):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Conv(nn.Linear(16, 8), nn.Linear(8, 4), F.gelu), VECTOR),
        (Conv(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1), F.relu6), IMAGE),
        (Conv(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1), lambda x: x + 1), IMAGE),
        (Conv(nn.Conv2d(4, 9, 1), nn.Linear(9, 3), lambda x: x.mean((1, 2))), IMAGE),
        (Conv(nn.Conv2d(4, 9, 1), nn.Linear(9, 3), torch.relu), IMAGE),  # along the width of the image
        (Conv(nn.Linear(16, 8), nn.Linear(8, 4), lambda x: x.to(torch.int64).float()), VECTOR),
        (Conv(nn.Linear(16, 8), nn.Linear(8, 4), lambda x: F.max_pool1d(x, 3, 1, 1)), VECTOR),  # over the channels
        (Conv(OwnNorm(added=1.0), nn.Linear(16, 4), nn.Identity()), VECTOR),
        (Residual(), VECTOR),
        (ReadElsewhere(), VECTOR),
        (Twice(), VECTOR),
    ],
)
def test_what_factors_cannot_pass(model: nn.Module, x: torch.Tensor) -> None:
    assert links_of(model, x) == []


def test_shared_parameters_have_no_part() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    assert links_of(model, VECTOR) == []


def test_equation_11_makes_the_ranges_equal() -> None:
    written, read = torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 1.0, 5.0, 0.0])
    assert equalizing_factor(written, read).tolist() == [2.0, 1.0, 1.0, 1.0]
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 8)[:, None])
    links = links_of(model, VECTOR)
    assert equalize(model, links) == 2
    for link in links:
        ranges = output_ranges(model.get_submodule(link.writer)) / reader_ranges(model, link)
        torch.testing.assert_close(ranges, torch.ones(8), rtol=0.05, atol=0)


@pytest.mark.parametrize("fold_norms", [True, False])
def test_eight_bits_of_a_depthwise_net_lose_less(fold_norms: bool, package_log: Any) -> None:
    model, loader = Separable().eval(), [images(50, seed) for seed in range(4)]
    found = {}
    for option in (False, True):
        small = compress_model(
            model, "ptq", train_loader=loader, equalize=option, fold_norms=fold_norms, min_saving=0.0
        )
        found[option] = decibels(small, model, images(200, 99))
    assert found[True] > found[False] + 5
    assert "equalized the ranges of channels across 3 pairs of layers" in package_log.text


def test_in_a_trainer_the_artefact_is_equalized_and_an_earlier_checkpoint_is_not_deployed(tmp_path: Path) -> None:
    callback = PTQCallback(equalize=True, min_saving=0.0)
    best = ModelCheckpoint(tmp_path, monitor="val_loss")
    trainer = quiet_trainer(tmp_path, [callback, best])
    model = fit(trainer, MLP())
    x = MLP.inputs(64)[0]
    artefact = load_compressed(MLP, callback.artifact)
    assert decibels(artefact, model.eval(), x) > 20
    torch.testing.assert_close(finalize(model)(x), artefact(x))
    trainer.test(model, MLP.loader(seed=2), ckpt_path=best.best_model_path, verbose=False)
    with pytest.raises(ModelError, match="'fc1' .*from before equalize.*artefact"):
        finalize(model)


def test_samples_are_asked_for() -> None:
    with pytest.raises(OptionError, match="equalize, smooth and keep_if need samples"):
        PTQCompression(scheme="dynamic", num_samples=0, equalize=True)
    with pytest.raises(CalibrationError, match="equalize or smooth sees on samples"):
        compress_model(Separable(), "ptq", scheme="dynamic", equalize=True)
