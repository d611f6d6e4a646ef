"""Few bits: what rounds the weights, with data and without, in numbers; and what is said where something is missing."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from pquant_lightning import PTQCallback, PTQCompression, compress_model, finalize, load_compressed
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CalibrationError, CheckpointError, OptionError
from tests.models import MLP, fit, quiet_trainer

WEIGHTS = {"scheme": "weight_only", "min_saving": 0.0}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def correlated(count: int, seed: int = 0) -> torch.Tensor:
    mixing = torch.randn(64, 64, generator=torch.Generator().manual_seed(7)) * torch.logspace(0, -1.5, 64)
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) @ mixing


def loader() -> list[Any]:
    return [correlated(60, seed) for seed in range(5)]


X = correlated(256, 99)


def error(small: nn.Module, x: torch.Tensor = X) -> float:
    with torch.no_grad():
        expected = network()(x)
        return float((small(x) - expected).norm() / expected.norm())


def roundings(model: nn.Module) -> list[str]:
    return [layer.spec["rounding"] for layer in compressed_layers(model).values()]


@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("bits", [3, 4])
def test_data_serve_better_than_none_and_that_better_than_nearest(bits: int, group_size: int | None) -> None:
    options = {**WEIGHTS, "bits": bits, "group_size": group_size, "first_last_bits": bits}
    gptq, nearest = (
        error(compress_model(network(), "ptq", train_loader=loader(), rounding=rounding, **options))
        for rounding in ("gptq", "nearest")
    )
    assert 0 < gptq < 0.8 * nearest


def test_learned_rounding_is_between_the_nearest_codes_and_gptq(package_log: Any) -> None:
    found = {
        rounding: error(
            compress_model(network(), "ptq", train_loader=loader(), rounding=rounding, bits=3, group_size=16, **WEIGHTS)
        )
        for rounding in ("nearest", "adaround", "gptq")
    }
    assert found["gptq"] < found["adaround"] < 0.95 * found["nearest"]
    assert "3 layers by AdaRound, with data" in package_log.text


def test_the_default_below_eight_bits_says_what_it_does(package_log: Any) -> None:
    made = {
        "with data": compress_model(network(), "ptq", train_loader=loader(), bits=4, **WEIGHTS),
        "without": compress_model(network(), "ptq", bits=4, **WEIGHTS),
        "no data wanted": compress_model(network(), "ptq", train_loader=loader(), bits=4, data_aware=False, **WEIGHTS),
    }
    assert {key: roundings(model) for key, model in made.items()} == {
        "with data": ["nearest", "gptq", "nearest"],  # eight bits in the first and the last layer
        "without": ["nearest", "hqq", "nearest"],
        "no data wanted": ["nearest", "hqq", "nearest"],
    }
    assert "2 layers by rounding to nearest, 1 layer by GPTQ, with data" in package_log.text
    assert "1 layer by HQQ, without data" in package_log.text
    assert "4-bit weights, gptq" in str(made["with data"])


def test_zero_points_where_no_integer_kernel_needs_symmetric_codes() -> None:
    shifted = network()
    with torch.no_grad():
        shifted[2].weight.add_(0.3)
    small = compress_model(shifted, "ptq", bits=4, group_size=16, **WEIGHTS)
    assert small[2].zero.dtype == torch.float16
    assert small[2].codes.numel() == 64 * 64 // 2
    static = compress_model(shifted, "ptq", train_loader=loader(), weight_bits=4, act_bits=8)
    assert static[2].zero is None
    assert static[2].spec["kernel"] == "integer"
    rounded, weight = small[2].dense_weight(), shifted[2].weight
    assert float((rounded - weight).norm() / weight.norm()) < 0.05


def test_the_order_of_the_inputs_and_damping_count() -> None:
    options = {**WEIGHTS, "bits": 3, "group_size": 16}
    base = error(compress_model(network(), "ptq", train_loader=loader(), **options))
    assert base < error(compress_model(network(), "ptq", train_loader=loader(), act_order=False, **options))
    assert base < error(compress_model(network(), "ptq", train_loader=loader(), damping=1.0, **options))


def test_statistics_that_do_not_fit_take_more_passes(package_log: Any) -> None:
    options = {**WEIGHTS, "bits": 4, "group_size": 16, "train_loader": loader()}
    at_once = compress_model(network(), "ptq", **options)
    assert "passes over the samples" not in package_log.text
    bounded = compress_model(network(), "ptq", max_statistics_bytes=4 * 64 * 65, **options)
    assert "do not fit into 16,640 bytes: 3 passes over the samples" in package_log.text
    assert all(torch.equal(a, b) for a, b in zip(at_once.buffers(), bounded.buffers(), strict=True))


def test_too_few_samples_are_damped_and_named(package_log: Any) -> None:
    small = compress_model(network(), "ptq", train_loader=[correlated(9)], bits=4, group_size=16, **WEIGHTS)
    assert "3 layers saw fewer input vectors than a vector has entries ('0': 9 for 64)" in package_log.text
    assert error(small) < 0.3


def test_layers_without_statistics_are_named_and_rounded_without(package_log: Any) -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    small = compress_model(Half(), "ptq", train_loader=loader(), bits=4, **WEIGHTS)
    assert "never reach layer 'unused': rounded without data, by HQQ" in package_log.text
    assert roundings(small) == ["gptq", "hqq"]


def test_data_that_are_wanted_and_not_given() -> None:
    for options in ({"rounding": "gptq"}, {"rounding": "adaround"}, {"data_aware": True}):
        with pytest.raises(CalibrationError, match="GPTQ.*train_loader"):
            compress_model(network(), "ptq", bits=4, **WEIGHTS, **options)
        with pytest.raises(OptionError, match="num_samples is at least 1"):
            PTQCompression(scheme="weight_only", num_samples=0, **options)
    with pytest.raises(OptionError, match="data_aware=False forbids"):
        PTQCompression(rounding="gptq", data_aware=False)
    with pytest.raises(OptionError, match="damping is a share"):
        PTQCompression(damping=0.0)
    with pytest.raises(OptionError, match="no rounding 'gptqq'.*'gptq'"):
        PTQCompression(rounding="gptqq")


class TestCheckpoints:
    OPTIONS: ClassVar[dict[str, Any]] = {"bits": 3, "scheme": "weight_only", "group_size": 8, "min_saving": 0.0}

    def fitted(self, tmp_path: Path) -> tuple[MLP, PTQCallback]:
        callback = PTQCallback(**self.OPTIONS)
        return fit(quiet_trainer(tmp_path, [callback]), MLP()), callback

    def test_a_checkpoint_after_the_fit_holds_what_was_rounded(self, tmp_path: Path) -> None:
        model, callback = self.fitted(tmp_path)
        x = MLP.inputs(32)[0]
        artefact = load_compressed(MLP, callback.artifact)
        assert torch.equal(artefact(x), finalize(model)(x))
        torch.save(model.state_dict(), tmp_path / "state.pt")
        again = load_compressed(MLP(), tmp_path / "state.pt")
        assert torch.equal(finalize(again)(x), artefact(x))
        assert torch.equal(finalize(copy.deepcopy(model))(x), artefact(x))

    def test_training_makes_it_stale(self, tmp_path: Path) -> None:
        model, _ = self.fitted(tmp_path)
        assert roundings(finalize(model)) == ["gptq"] * 3
        model.train()(MLP.inputs(32)[0])
        assert roundings(finalize(model)) == ["hqq"] * 3

    def test_other_weights_drop_it_and_equal_ones_keep_it(self, tmp_path: Path) -> None:
        model, _ = self.fitted(tmp_path)
        state = {key: value for key, value in model.state_dict().items() if "rounded" not in key}
        model.load_state_dict(state)
        assert roundings(finalize(model)) == ["gptq"] * 3
        model.load_state_dict({key: v * 2 if key.endswith("weight") else v for key, v in state.items()})
        assert roundings(finalize(model)) == ["hqq"] * 3

    def test_damaged_roundings_are_refused(self, tmp_path: Path) -> None:
        model, _ = self.fitted(tmp_path)
        state = model.state_dict()
        for key, value in (("fc1.rounded_codes", torch.zeros(3)), ("fc1.rounded_zero", None)):
            damaged = {**state, key: value} if value is not None else {k: v for k, v in state.items() if k != key}
            with pytest.raises(CheckpointError, match="rounded"):
                model.load_state_dict(damaged)


class Doubles(nn.Module):
    """An embedding, convolutions, plain, grouped and transposed, and a Linear, for sequences of tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.conv = nn.Embedding(16, 8), nn.Conv1d(8, 8, 3, groups=2)
        self.up, self.head = nn.ConvTranspose1d(8, 8, 3), nn.Linear(8, 8)

    def forward(self, ids):
        return self.head(self.up(self.conv(self.embed(ids).mT).relu()).mT)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ptq", {"rounding": "gptq", "bits": 4}),
        ("ptq", {"rounding": "adaround", "bits": 4, "scheme": "weight_only"}),
        ("ptq", {"rounding": "awq", "bits": 8, "weight_bits": 4, "scheme": "dynamic"}),
        ("ptq", {"weight_bits": 4}),
        ("mixed_precision", {"average_bits": 4}),
        ("mixed_precision", {"average_bits": 4, "sensitivity": "output"}),
    ],
    ids=str,
)
def test_models_in_double_precision(method, options):
    ids = torch.randint(16, (8, 10), generator=torch.Generator().manual_seed(0))
    single, double = (
        compress_model(model, method, train_loader=[ids], min_saving=0.0, **options)
        for model in (Doubles(), Doubles().double())
    )
    assert double(ids).dtype == torch.float64
    for name in ("embed", "conv", "up", "head"):
        codes = [m.get_submodule(name).weight_codes() for m in (single, double)]
        assert (codes[0] != codes[1]).float().mean() < 0.05  # ties
