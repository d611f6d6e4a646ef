"""SmoothQuant and AWQ: outlier channels hurt less, and the float model computes the same."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pquant_lightning import PTQCompression, compress_model
from pquant_lightning.core.calibration import Samples, run_forward
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CalibrationError, OptionError
from pquant_lightning.core.graph import trace
from pquant_lightning.core.moments import collect_moments
from pquant_lightning.methods.quantization._awq import best_factor, output_error
from pquant_lightning.methods.quantization._scaling import Link, find_links
from pquant_lightning.methods.quantization._smoothing import largest_inputs, smooth, smoothing_factor


class PreNorm(nn.Module):
    """Two blocks before which the input is normalised; some channels of the norms are far louder than the others."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm1, self.norm2 = norm(64), norm(64)
        self.q, self.k, self.v, self.out = (nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)
        with torch.no_grad():
            for module in (self.norm1, self.norm2):
                module.weight[::16] = 60.0
            for layer in (self.q, self.k, self.v, self.up):
                layer.weight[:, ::16] /= 20
            self.up.weight[::32] *= 20
            self.down.weight[:, ::32] /= 20

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        x = x + self.out(F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        return x + self.down(F.relu(self.up(self.norm2(x))))


def batches(count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, 64, generator=generator) for _ in range(count)]


(X,) = batches(1, 99)
LINKS = [
    Link("norm1", None, (("q", 1), ("k", 1), ("v", 1))),
    Link("norm2", None, (("up", 1),)),
    Link("up", None, (("down", 1),)),
]


def decibels(small: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        expected = model(X)
        return float(10 * torch.log10(expected.square().sum() / (small(X) - expected).square().sum()))


def test_equation_4_shares_the_range_between_inputs_and_weights() -> None:
    inputs, weights = torch.tensor([16.0, 1.0, 0.0]), torch.tensor([1.0, 4.0, 1.0])
    assert smoothing_factor(inputs, weights, 0.5).tolist() == [4.0, 0.5, 1.0]
    assert smoothing_factor(inputs, weights, 1.0).tolist() == [16.0, 1.0, 1.0]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_float_model_computes_the_same(norm: type[nn.Module]) -> None:
    model = PreNorm(norm).eval()
    samples = Samples(tuple(batches()), run_forward)
    assert find_links(model, trace(model, samples)) == LINKS
    small = compress_model(model, "ptq", train_loader=batches(), smooth=0.5, min_saving=0.0, exclude=["down"])
    assert torch.equal(model.norm1.weight[:1], torch.tensor([60.0]))  # a copy was changed
    assert float(small.norm1.weight.detach().max()) < 30
    changed = copy.deepcopy(model)
    assert smooth(changed, LINKS, samples, 0.5) == 0  # no layer rounds its inputs
    largest = largest_inputs(model, ["q"], samples)["q"]
    with torch.no_grad():
        seen = torch.cat([model.norm1(x) for x in batches()]).abs().amax((0, 1))
    torch.testing.assert_close(largest, seen)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_eight_bit_inputs_with_outlier_channels_lose_less(scheme: str, package_log: Any) -> None:
    model = PreNorm().eval()
    found = {
        strength: decibels(
            compress_model(model, "ptq", train_loader=batches(), scheme=scheme, smooth=strength, min_saving=0.0), model
        )
        for strength in (None, 0.5)
    }
    assert found[0.5] > found[None] + 4
    assert "ptq has smoothed the inputs at 3 places" in package_log.text


class TestAWQ:
    def test_the_output_error_is_at_most_that_of_the_nearest_codes(self) -> None:
        model = PreNorm().eval()
        plan = PTQCompression(bits=3, scheme="weight_only", group_size=16, rounding="awq", min_saving=0.0)
        samples = Samples(tuple(batches()), run_forward)
        held = copy.deepcopy(model)
        plan.apply(held, plan.plan(held))
        for link in LINKS:
            names = [name for name, _ in link.readers]
            moments = collect_moments(held, names, samples)
            readers = [(held.get_submodule(name), 1, moments[name]) for name in names]
            factor = best_factor(readers)
            errors = [
                sum(output_error(layer, one, found) for layer, _, found in readers)
                for one in (factor, torch.ones_like(factor))
            ]
            assert errors[0] < 0.8 * errors[1]

    @pytest.mark.parametrize("bits", [3, 4])
    def test_few_bits_lose_less_than_to_nearest(self, bits: int, package_log: Any) -> None:
        model = PreNorm().eval()
        options = {"bits": bits, "scheme": "weight_only", "group_size": 16, "min_saving": 0.0}
        awq, nearest = (
            compress_model(model, "ptq", train_loader=batches(), rounding=rounding, **options)
            for rounding in ("awq", "nearest")
        )
        assert decibels(awq, model) > decibels(nearest, model) + 1
        assert "AWQ cannot scale the inputs of 'out'" in package_log.text
        roundings = {name: layer.spec["rounding"] for name, layer in compressed_layers(awq).items()}
        assert roundings == {**dict.fromkeys(["q", "k", "v", "up", "down"], "awq"), "out": "nearest"}
        assert f"{bits}-bit weights" in str(awq)


def test_options() -> None:
    with pytest.raises(OptionError, match=r"smooth is a strength in \[0, 1\].*got 1.5"):
        PTQCompression(smooth=1.5)
    with pytest.raises(OptionError, match="smooth helps layers that round their inputs"):
        PTQCompression(scheme="weight_only", smooth=0.5)
    with pytest.raises(OptionError, match="need samples"):
        PTQCompression(scheme="dynamic", num_samples=0, smooth=0.5)
    with pytest.raises(CalibrationError, match="AWQ"):
        compress_model(PreNorm(), "ptq", scheme="weight_only", bits=4, rounding="awq")
