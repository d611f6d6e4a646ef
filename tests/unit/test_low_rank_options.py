"""Options of low_rank on whole models: each with the difference it makes in numbers, and what is refused."""

import copy
import logging

import pytest
import torch
from torch import nn

from pquant_lightning import LowRankCallback, LowRankCompression, compress_model
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.errors import BudgetError, CalibrationError, OptionError
from tests.models import MLP, Transformer, built, fit, quiet_trainer


class Deep(nn.Module):
    """Correlated inputs, three layers of which the second matters little, and a convolution in front."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 16, 3, padding=1)
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 48), nn.Linear(48, 48), nn.Linear(48, 16)
        with torch.no_grad():
            self.fc2.weight.mul_(0.02)

    def forward(self, x):
        h = torch.relu(self.conv(x)).mean((2, 3))
        h = torch.relu(self.fc1(h))
        return self.fc3(h + self.fc2(h))


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    x = torch.nn.functional.avg_pool2d(torch.randn(256, 4, 8, 8, generator=generator), 3, 1) + 0.4
    return [(part, torch.zeros(len(part))) for part in x.split(32)]


def _error(model, original, data):
    """Relative squared error of the outputs."""
    with torch.no_grad():
        wanted = torch.cat([original.eval()(x) for x, _ in data])
        given = torch.cat([model.eval()(x) for x, _ in data])
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def _kept(model, original):
    def count(m):
        return sum(p.numel() for p in m.parameters() if p.dim() > 1)

    return count(model) / count(original)


def _ranks(model):
    specs = {name: getattr(module, "spec", {}) for name, module in model.named_modules()}
    return {name: spec["rank"] for name, spec in specs.items() if "rank" in spec}


class TestData:
    def test_data_make_the_outputs_better_and_are_used_where_they_are(self, data, caplog):
        model = Deep()
        plain = compress_model(model, "low_rank", train_loader=data, param_ratio=0.5, data_aware=False)
        with caplog.at_level(logging.INFO):
            aware = compress_model(model, "low_rank", train_loader=data, param_ratio=0.5)
        assert "low_rank has fitted layers to their inputs in 256 samples" in caplog.text
        assert _ranks(plain) == _ranks(aware)
        assert _error(aware, model, data) < 0.5 * _error(plain, model, data)

    def test_the_given_model_and_its_biases_stay(self, data):
        model = Deep()
        before = copy.deepcopy(model.state_dict())
        options = [{"param_ratio": 0.5}, {"param_ratio": 0.5, "sequential": True}, {"budget": {"params": 0.5}}]
        for given in options:
            compress_model(model, "low_rank", train_loader=data, **given)
        LowRankCompression(budget={"params": 0.5}).plan(model, _context(data))
        assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())

    def test_in_a_trainer_plain_factors_are_the_default(self, tmp_path, caplog):
        assert LowRankCompression().wanted_samples_in_trainer == 0
        for options, used in ({}, False), ({"data_aware": True}, True), ({"sequential": True}, True):
            caplog.clear()
            with caplog.at_level(logging.INFO):
                model = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=3, **options)]), built(MLP))
            assert _ranks(model)["fc1"] == 3
            assert ("fitted layers to their inputs" in caplog.text) == used

    def test_num_samples(self, data, caplog):
        with caplog.at_level(logging.INFO):
            compress_model(Deep(), "low_rank", train_loader=data, rank=4, num_samples=40)
        assert "in 40 samples" in caplog.text

    @pytest.mark.parametrize("options", [{"data_aware": True}, {"sequential": True}])
    def test_without_data_is_an_error(self, options):
        with pytest.raises(CalibrationError, match="give compress_model a train_loader"):
            compress_model(Deep(), "low_rank", rank=4, **options)

    def test_data_that_do_not_fit_are_an_error_only_where_they_are_asked_for(self, caplog):
        wrong = [torch.zeros(2, 3)]
        compress_model(Deep(), "low_rank", train_loader=wrong, rank=4)
        assert "low_rank goes on without data: Deep cannot be run" in caplog.text
        with pytest.raises(CalibrationError, match="Deep cannot be run"):
            compress_model(Deep(), "low_rank", train_loader=wrong, rank=4, data_aware=True)

    def test_too_few_samples_are_said(self, data, caplog):
        compress_model(Deep(), "low_rank", train_loader=data, rank=4, num_samples=30, include=["*"])
        assert "2 layers (fc2, fc3) saw fewer input vectors than a vector has entries" in caplog.text

    def test_layers_that_are_not_reached_are_said(self, caplog):
        class Half(nn.Module):
            def __init__(self):
                super().__init__()
                self.used, self.unused = nn.Linear(20, 20), nn.Linear(20, 20)

            def forward(self, x):
                return self.used(x)

        for options in ({}, {"sequential": True}):
            caplog.clear()
            compress_model(Half(), "low_rank", train_loader=[torch.randn(50, 20)], rank=4, **options)
            assert "The samples never reach unused: fitted to the weights alone" in caplog.text

    def test_max_statistics_bytes_bounds_what_is_held(self, data, caplog):
        model = Deep()
        whole = compress_model(model, "low_rank", train_loader=data, param_ratio=0.5)
        with caplog.at_level(logging.INFO):
            parts = compress_model(model, "low_rank", train_loader=data, param_ratio=0.5, max_statistics_bytes=10_000)
        assert "passes (max_statistics_bytes)" in caplog.text
        assert _error(parts, model, data) < 1.5 * _error(whole, model, data)

    def test_energy_is_that_of_the_outputs(self, data):
        model = Deep()
        plain = compress_model(model, "low_rank", energy=0.9, min_saving=0, include=["fc*"])
        aware = compress_model(model, "low_rank", train_loader=data, energy=0.9, min_saving=0, include=["fc*"])
        assert all(_ranks(aware)[name] < _ranks(plain)[name] for name in ("fc1", "fc2", "fc3"))


def _context(data, **options):
    method = LowRankCompression(**options)
    return CompressionContext(by="test", samples=method.samples_of(data))


class TestSequential:
    def test_errors_before_are_made_good(self, data):
        model = Deep()
        with torch.no_grad():
            model.fc2.weight.mul_(50)
        apart = compress_model(model, "low_rank", train_loader=data, param_ratio=0.3)
        fitted = compress_model(model, "low_rank", train_loader=data, param_ratio=0.3, sequential=True)
        assert _ranks(apart) == _ranks(fitted)
        assert _error(fitted, model, data) < 0.9 * _error(apart, model, data)

    def test_on_a_transformer_with_unreached_and_padded_places(self):
        model = built(Transformer).eval()
        small = compress_model(model, "low_rank", train_loader=model.loader(), rank=3, sequential=True)
        assert {"embed", "encoder.layers.0.linear1", "encoder.layers.1.linear2"} <= set(_ranks(small))
        again = compress_model(model, "low_rank", train_loader=model.loader(), rank=3, sequential=True)
        assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))

    def test_it_needs_data(self):
        with pytest.raises(OptionError, match="sequential=True fits layers to data, which data_aware=False forbids"):
            LowRankCompression(sequential=True, data_aware=False)


class TestBudget:
    @pytest.mark.parametrize("share", [0.2, 0.5])
    def test_params_are_kept_to_the_share_and_go_where_they_matter(self, data, share):
        model = Deep()
        even = compress_model(model, "low_rank", train_loader=data, param_ratio=share, include=["*"])
        shared = compress_model(model, "low_rank", train_loader=data, budget={"params": share}, include=["*"])
        assert share - 0.05 < _kept(shared, model) <= share
        assert _error(shared, model, data) < 0.7 * _error(even, model, data)
        assert _ranks(shared)["fc2"] < 0.5 * _ranks(even)["fc2"]  # it matters least

    def test_macs_count_the_positions(self, data):
        """The convolution runs at 36 positions: nearly all multiplications are its own."""
        model = Deep()
        params = compress_model(model, "low_rank", train_loader=data, budget={"params": 0.4}, include=["*"])
        macs = compress_model(model, "low_rank", train_loader=data, budget={"macs": 0.4}, include=["*"])

        def share(m):
            def count(x):
                weights = [(36 if "conv" in name else 1) * p.numel() for name, p in x.named_parameters() if p.dim() > 1]
                return sum(weights)

            return count(m) / count(model)

        assert 0.3 < share(macs) <= 0.4 < share(params)

    def test_an_allowed_error_is_met_with_few_parameters(self, data):
        model = Deep()
        loose, tight = (
            compress_model(model, "low_rank", train_loader=data, budget={"error": error}, include=["*"])
            for error in (0.3, 0.05)
        )
        assert _kept(loose, model) < _kept(tight, model) < 1
        assert _error(loose, model, data) ** 0.5 < 0.36
        assert _error(tight, model, data) ** 0.5 < 0.06

    def test_without_data_the_weights_decide(self):
        model = Deep()
        small = compress_model(model, "low_rank", budget={"params": 0.5}, include=["*"])
        assert 0.45 < _kept(small, model) <= 0.5
        loose = compress_model(model, "low_rank", budget={"error": 0.3}, include=["*"])
        errors = [
            (model.get_submodule(name).weight - loose.get_submodule(name).weight).square().sum()
            / model.get_submodule(name).weight.square().sum()
            for name in ("conv", "fc1", "fc2", "fc3")
        ]
        assert 0.2 < (sum(errors) / 4) ** 0.5 <= 0.3

    def test_layers_left_dense_are_said(self, data):
        model = Deep()
        plan = LowRankCompression(budget={"params": 0.9}).plan(model, _context(data))
        reasons = {skip.name: skip.reason for skip in plan.skipped}
        assert any("the budget {'params': 0.9} leaves it as it is" in reason for reason in reasons.values())

    def test_what_cannot_be_met(self):
        with pytest.raises(BudgetError, match="lowest rank .*% are kept. Allow at least that"):
            compress_model(Deep(), "low_rank", budget={"params": 0.01})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": {"bytes": 0.5}}, "budget has one entry, one of 'params', 'macs', 'error'"),
            ({"budget": {"params": 0.5, "macs": 0.5}}, "budget has one entry"),
            ({"budget": {}}, "budget has one entry"),
            ({"budget": {"macs": 1.5}}, r"budget\['macs'\] is a share that is kept, in \(0, 1\], got 1.5"),
            ({"budget": {"params": 0.5}, "param_ratio": 0.5}, "Remove all but one"),
            ({"rank": "evbmf", "energy": 0.5}, "Remove all but one"),
            ({"rank": 0}, "rank is a count, at least 1, got 0"),
            ({"rank": "evb"}, "takes int or 'evbmf' or None for rank, got 'evb'"),
            ({"round_to": 0}, "round_to is a count"),
            ({"num_samples": 0}, "num_samples is a count"),
            ({"max_statistics_bytes": 0}, "max_statistics_bytes is a count"),
            ({"split": "scheme2"}, "has no split 'scheme2'"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(OptionError, match=message):
            LowRankCompression(**options)


class TestRanks:
    def test_above_the_full_rank_all_singular_values_are_kept(self):
        model = nn.Sequential(nn.Linear(8, 6))
        small = compress_model(model, "low_rank", rank=7, min_saving=0)
        assert _ranks(small) == {"0": 6}

    def test_evbmf_keeps_what_stands_out_of_the_noise(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(120, 80), nn.Linear(80, 120))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(80, 9) @ torch.randn(9, 120) + 0.3 * torch.randn(80, 120))
            model[1].weight.copy_(torch.randn(120, 80))
        plan = LowRankCompression(rank="evbmf").plan(model)
        assert {entry.name: entry.spec["rank"] for entry in plan.layers} == {"0": 9}
        assert "EVBMF finds no signal above the noise" in plan.skipped[0].reason

    @pytest.mark.parametrize(
        ("options", "free", "rounded"),
        [({"param_ratio": 0.5}, 10, 8), ({"energy": 0.7}, 14, 16), ({"rank": 11}, 11, 11)],
    )
    def test_round_to(self, options, free, rounded):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(48, 40))
        found = [
            LowRankCompression(**options, min_saving=0, round_to=multiple).plan(model).layers[0].spec["rank"]
            for multiple in (1, 8)
        ]
        assert found == [free, rounded]

    def test_round_to_in_a_budget_and_evbmf(self, data):
        small = compress_model(Deep(), "low_rank", train_loader=data, budget={"params": 0.5}, round_to=4)
        assert all(rank % 4 == 0 for rank in _ranks(small).values())
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(120, 80))
        with torch.no_grad():
            model[0].weight.copy_(torch.randn(80, 9) @ torch.randn(9, 120) + 0.3 * torch.randn(80, 120))
        assert _ranks(compress_model(model, "low_rank", rank="evbmf", round_to=8)) == {"0": 16}

    def test_a_multiple_that_keeps_too_much_is_said(self):
        plan = LowRankCompression(param_ratio=0.25, round_to=16).plan(nn.Sequential(nn.Linear(32, 32)))
        assert "even rank 16 keeps more than 25% of its weights" in plan.skipped[0].reason


class TestSplit:
    @staticmethod
    def _conv(separable):
        torch.manual_seed(0)
        conv = nn.Conv2d(12, 12, 5, padding=2)
        down, across = torch.randn(3, 12, 5), torch.randn(12, 3, 5)
        with torch.no_grad():
            if separable:  # rank 3 by direction, nearly full rank by channel
                conv.weight.copy_(torch.einsum("rih,orw->oihw", down, across))
            else:
                conv.weight.copy_(torch.einsum("or,rihw->oihw", across[:, :, 0], torch.randn(3, 12, 5, 5)))
        return nn.Sequential(conv)

    @pytest.mark.parametrize("separable", [True, False])
    @pytest.mark.parametrize("options", [{"param_ratio": 0.3}, {"energy": 0.99}, {"budget": {"params": 0.3}}])
    @pytest.mark.parametrize("with_data", [True, False])
    def test_auto_takes_the_better_one(self, separable, options, with_data):
        model = self._conv(separable)
        loader = [torch.randn(20, 12, 7, 7)] if with_data else None
        small = compress_model(model, "low_rank", train_loader=loader, **options)
        assert small[0].kind == ("low_rank_spatial_conv" if separable else "low_rank_conv")
        if "energy" not in options:
            assert (small[0].dense_weight() - model[0].weight).norm() < 1e-3 * model[0].weight.norm()

    def test_a_count_goes_by_channel_and_spatial_is_taken_on_request(self):
        model = self._conv(True)
        assert compress_model(model, "low_rank", rank=3)[0].kind == "low_rank_conv"
        small = compress_model(model, "low_rank", rank=3, split="spatial")
        assert [tuple(m.kernel_size) for m in (small[0].first, small[0].second)] == [(5, 1), (1, 5)]
        assert (small[0].dense_weight() - model[0].weight).norm() < 1e-3 * model[0].weight.norm()
        assert compress_model(model, "low_rank", param_ratio=0.5, split="channel")[0].kind == "low_rank_conv"

    def test_windows_without_two_directions_are_split_by_channel(self):
        model = nn.Sequential(nn.Conv1d(16, 16, 3), nn.Conv2d(16, 16, (1, 3)), nn.Linear(16, 16))
        plan = LowRankCompression(rank=2, split="spatial", include=["*"]).plan(model)
        assert [entry.spec["kind"] for entry in plan.layers] == ["low_rank_conv", "low_rank_conv", "low_rank_linear"]

    def test_a_layer_that_would_get_slower_is_left_alone(self):
        model = nn.Sequential(nn.Conv2d(16, 16, 3, stride=(1, 3)))
        plan = LowRankCompression(rank=16, split="spatial").plan(model)
        assert not plan.layers
        assert "multiply-accumulates per position instead of 2,304" in plan.skipped[0].reason
        assert LowRankCompression(rank=16, split="spatial", min_saving=0).plan(model).layers
