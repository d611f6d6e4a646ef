"""Bits per layer: sensitivities, budgets, plans, caches, the metric that may drop, and the start of training."""

import json
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionPlan,
    MixedPrecisionCallback,
    MixedPrecisionCompression,
    PTQCompression,
    QATCallback,
    QATCompression,
    QuantizationCompression,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.compression_method import CompressionContext
from pquant_lightning.core.deploy import stored_bytes
from pquant_lightning.core.errors import BudgetError, CalibrationError, ModelError, OptionError
from tests.models import MLP, TiedTransformer, fit, quiet_trainer

WEIGHTS: dict[str, Any] = {"scheme": "weight_only", "min_saving": 0.0}


class TwoPaths(nn.Module):
    """The output hangs on `main` and hardly on `side`."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side, self.tail = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail((self.main(x) + 0.05 * self.side(x)).relu())


def network() -> nn.Module:
    torch.manual_seed(0)
    return TwoPaths()


X = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))


def context() -> CompressionContext:
    return CompressionContext(by="mixed_precision", samples=PTQCompression().samples_of([X]))


def bits_of(plan: CompressionPlan) -> dict[str, int]:
    return {entry.name: entry.spec["bits"] for entry in plan.layers}


def average(model: nn.Module, bits: dict[str, int]) -> float:
    count = {name: model.get_submodule(name).weight.numel() for name in bits}
    return sum(bits[name] * count[name] for name in bits) / sum(count.values())


def error(small: nn.Module) -> float:
    with torch.no_grad():
        expected = network()(X)
        return float((small(X) - expected).norm() / expected.norm())


@pytest.mark.parametrize("sensitivity", ["output", "fisher"])
def test_sensitivities_fall_with_bits_and_name_the_layer_that_matters(sensitivity: str) -> None:
    method = MixedPrecisionCompression(average_bits=4, sensitivity=sensitivity, **WEIGHTS)
    plan = method.plan(network(), context())
    found = {entry.name: entry.spec["sensitivity"] for entry in plan.layers}
    for losses in found.values():
        ordered = [losses[str(bits)] for bits in (2, 3, 4, 6, 8)]
        assert all(few > many > 0 for few, many in pairwise(ordered))
    assert found["side"]["3"] < 0.1 * found["main"]["3"]
    assert "sensitivity={'2': " in str(plan)


def test_the_two_sensitivities_agree_in_size() -> None:
    """The Gauss-Newton estimate is the measured error up to second order; at 6 bits the rest is small."""
    found = [
        {e.name: e.spec["sensitivity"]["6"] for e in method.plan(network(), context()).layers}
        for method in (
            MixedPrecisionCompression(sensitivity="output", sensitivity_samples=64, **WEIGHTS),
            MixedPrecisionCompression(sensitivity="fisher", sensitivity_samples=64, **WEIGHTS),
        )
    ]
    for name, measured in found[0].items():
        assert 0.25 < found[1][name] / measured < 4


@pytest.mark.parametrize("budget", [2.5, 3, 4.3, 6])
def test_the_allocation_is_the_best_of_all(budget: float) -> None:
    model = network()
    plan = MixedPrecisionCompression(average_bits=budget, **WEIGHTS).plan(model, context())
    losses = {entry.name: {**entry.spec["sensitivity"], "16": 0.0} for entry in plan.layers}
    assert average(model, bits_of(plan)) <= budget
    every = [dict(zip(losses, bits, strict=True)) for bits in product((2, 3, 4, 6, 8), repeat=3)]
    least = min(sum(losses[n][str(b)] for n, b in bits.items()) for bits in every if average(model, bits) <= budget)
    assert sum(losses[n][str(b)] for n, b in bits_of(plan).items()) <= least * 1.001


def test_mixed_bits_beat_equal_ones_at_the_same_bytes() -> None:
    options = {**WEIGHTS, "train_loader": [X]}
    mixed = compress_model(network(), "mixed_precision", average_bits=4, **options)
    equal = compress_model(network(), "ptq", bits=4, first_last_bits=4, **options)
    assert stored_bytes(mixed) <= stored_bytes(equal)
    assert error(mixed) < 0.9 * error(equal)


def test_a_size_in_megabytes_is_kept_to() -> None:
    for target in (0.003, 0.005, 0.008):
        small = compress_model(network(), "mixed_precision", train_loader=[X], target_size_mb=target, **WEIGHTS)
        assert 0.8 * target * 1e6 < stored_bytes(small) <= target * 1e6


def test_without_samples_the_weights_say_it(package_log: Any) -> None:
    plan = MixedPrecisionCompression(average_bits=4, **WEIGHTS).plan(network())
    assert "can be rounded is judged by weights alone" in package_log.text
    assert average(network(), bits_of(plan)) <= 4


def test_what_cannot_be_met_says_what_can() -> None:
    pinned = {"overrides": {"tail": {"weight_bits": 8}}}
    with pytest.raises(BudgetError, match=r"average_bits=2 cannot be met.*average is"):
        compress_model(network(), "mixed_precision", average_bits=2, **pinned, **WEIGHTS)
    with pytest.raises(BudgetError, match=r"target_size_mb=0.001 cannot be met.*takes 0.002"):
        compress_model(network(), "mixed_precision", target_size_mb=0.001, **WEIGHTS)
    with pytest.raises(BudgetError, match=r"average is"):
        compress_model(network(), "mixed_precision", average_bits=3, choices=[4, 8], **pinned, **WEIGHTS)


@pytest.mark.parametrize("name", ["mixed_precision", "qat"])
def test_a_shared_weight_has_one_number_of_bits(name: str) -> None:
    options = {"average_bits": 4, "min_saving": 0.0}
    small = finalize(compress_model(TiedTransformer(), name, train_loader=TiedTransformer.loader(), **options))
    assert small.embed.spec["bits"] == small.head.spec["bits"]
    assert small.head.spec["tied_to"]
    assert small.embed.codes is small.head.codes


def test_choices_pins_and_ends() -> None:
    def bits(**options: Any) -> list[int]:
        method = MixedPrecisionCompression(**{"average_bits": 5, **WEIGHTS, **options})
        return list(bits_of(method.plan(network(), context())).values())

    assert set(bits(choices=[3, 6])) <= {3, 6}
    assert bits(overrides={"tail": {"weight_bits": 3}})[2] == 3
    ends = bits(first_last_bits=6, average_bits=6)
    assert ends[0] >= 6
    assert ends[2] >= 6


def test_sixteen_bits_leave_a_layer_in_floating_point() -> None:
    small = compress_model(network(), "mixed_precision", train_loader=[X], average_bits=11, choices=[4, 16], **WEIGHTS)
    assert [type(layer) for layer in small.children()].count(nn.Linear) == 1
    assert any(layer.spec["bits"] == 4 for layer in compressed_layers(small).values())


def test_gradients_that_do_not_flow_are_explained() -> None:
    class Closed(TwoPaths):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    with pytest.raises(CalibrationError, match="no gradient.*sensitivity='output'"):
        compress_model(Closed(), "mixed_precision", train_loader=[X], **WEIGHTS)
    assert compress_model(Closed(), "mixed_precision", train_loader=[X], sensitivity="output", **WEIGHTS)


def test_the_number_of_samples_counts() -> None:
    found = [
        MixedPrecisionCompression(sensitivity_samples=count, **WEIGHTS).plan(network(), context()).layers[0].spec
        for count in (1, 64)
    ]
    assert found[0]["sensitivity"] != found[1]["sensitivity"]


def test_a_plan_can_be_edited_and_applied() -> None:
    model, method = network(), MixedPrecisionCompression(average_bits=4, **WEIGHTS)
    plan = CompressionPlan.from_json(method.plan(model, context()).to_json())
    first = replace(plan.layers[0], spec={**plan.layers[0].spec, "bits": 7})
    method.apply(model, replace(plan, layers=(first, *plan.layers[1:])))
    method.calibrate(model, context())
    assert finalize(model).main.spec["bits"] == 7
    assert [layer.spec["bits"] for layer in compressed_layers(finalize(model)).values()][1:] == list(
        bits_of(plan).values()
    )[1:]


def test_the_artefact_keeps_the_sensitivities_for_another_budget(tmp_path: Path, monkeypatch: Any) -> None:
    small = compress_model(network(), "mixed_precision", train_loader=[X], average_bits=4, **WEIGHTS)
    path = save_compressed(small, tmp_path / "four.safetensors")
    measured = MixedPrecisionCompression(average_bits=3, **WEIGHTS).plan(network(), context())
    monkeypatch.setattr("pquant_lightning.methods.quantization.mixed_precision.measure", None)
    cached = MixedPrecisionCompression(average_bits=3, sensitivities=str(path), **WEIGHTS).plan(network(), context())
    assert bits_of(cached) == bits_of(measured)
    assert json.loads(cached.to_json())["layers"][0]["spec"]["sensitivity"] == small.main.spec["sensitivity"]
    plain = save_compressed(compress_model(network(), "ptq", bits=4, **WEIGHTS), tmp_path / "plain.safetensors")
    with pytest.raises(OptionError, match="holds no sensitivity of layer 'main'"):
        MixedPrecisionCompression(sensitivities=str(plain), **WEIGHTS).plan(network())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"average_bits": 4, "target_size_mb": 1.0}, "takes one of"),
        ({"average_bits": 0.0}, "average_bits is positive"),
        ({"max_drop": 0.1}, "goes with monitor"),
        ({"max_drop": 0.1, "monitor": "val_acc", "first_last_bits": 8}, "leave first_last_bits out"),
        ({"weight_bits": 4}, "budget chooses the bits.*overrides"),
        ({"choices": [5]}, "choices are some of"),
        ({"sensitivity_samples": 0}, "sensitivity_samples >= 1"),
        ({"sensitivity": "hessain"}, "no sensitivity 'hessain'"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MixedPrecisionCompression(**options)


def test_the_family_makes_it() -> None:
    assert isinstance(QuantizationCompression(method="mixed_precision", average_bits=5), MixedPrecisionCompression)


class Scored(MLP):
    """Logs how far its outputs are from those of the weights it was made with."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__(lr)
        self.first: list[Any] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self(batch[0])
        if len(self.first) <= batch_idx:
            self.first.append(out.detach())
        self.log("distance", (out - self.first[batch_idx]).norm() / self.first[batch_idx].norm())


class TestTrainer:
    def test_the_bits_of_the_artefact_are_those_of_the_start(self, tmp_path: Path) -> None:
        callback, model = MixedPrecisionCallback(average_bits=4, **WEIGHTS), MLP(lr=0.05)
        samples = callback.method.samples_of(MLP.loader())
        planned = bits_of(callback.method.plan(model, CompressionContext(by="x", samples=samples)))
        fit(quiet_trainer(tmp_path, [callback], max_epochs=2), model)
        artefact = load_compressed(MLP, callback.artifact)
        bits = {name: layer.spec["bits"] for name, layer in compressed_layers(artefact).items()}
        assert bits == planned
        assert average(model, bits) <= 4

    def test_the_metric_decides(self, tmp_path: Path) -> None:
        averages = {}
        for allowed in (0.5, 0.1, 0.02):
            callback = MixedPrecisionCallback(max_drop=allowed, monitor="distance", mode="min", **WEIGHTS)
            trainer = quiet_trainer(tmp_path, [callback])
            model = Scored()
            fit(trainer, model)
            artefact = load_compressed(Scored(), callback.artifact)
            bits = {name: layer.spec["bits"] for name, layer in compressed_layers(artefact).items()}
            averages[allowed] = average(model, bits)
            x = torch.cat([batch[0] for batch in MLP.loader(seed=1)])
            expected, found = model.eval()(x), artefact(x)
            assert (found - expected).norm() / expected.norm() < 1.3 * allowed
        assert averages[0.5] < averages[0.1] < averages[0.02] <= 8

    def test_a_drop_that_cannot_be_kept(self, tmp_path: Path) -> None:
        callback = MixedPrecisionCallback(max_drop=0.0, monitor="distance", mode="min", bits=2, min_saving=0.0)
        with pytest.raises(BudgetError, match="max_drop=0 of distance cannot be met: 8 bits in every layer lose"):
            fit(quiet_trainer(tmp_path, [callback]), Scored())

    def test_a_metric_that_is_not_logged(self, tmp_path: Path) -> None:
        callback = MixedPrecisionCallback(max_drop=0.1, monitor="val_acc", **WEIGHTS)
        with pytest.raises(OptionError, match="monitor='val_acc' is not logged.*'val_loss'"):
            fit(quiet_trainer(tmp_path, [callback]), MLP())

    def test_without_validation_nothing_is_logged(self, tmp_path: Path) -> None:
        callback = MixedPrecisionCallback(max_drop=0.1, monitor="val_acc", **WEIGHTS)
        with pytest.raises(OptionError, match="Nothing is logged"):
            quiet_trainer(tmp_path, [callback], limit_val_batches=0).fit(MLP(), MLP.loader())

    def test_outside_of_a_trainer_there_is_no_metric(self) -> None:
        with pytest.raises(ModelError, match="MixedPrecisionCallback"):
            compress_model(network(), "mixed_precision", max_drop=0.1, monitor="val_acc", **WEIGHTS)


class TestTrainingWithThem:
    def test_the_bits_are_the_start_of_quantization_aware_training(self, tmp_path: Path) -> None:
        callback = QATCallback(average_bits=3.5, act_bits=8, min_saving=0.0)
        model = fit(quiet_trainer(tmp_path, [callback]), MLP())
        bits = {name: layer.spec["bits"] for name, layer in compressed_layers(model).items()}
        assert len(set(bits.values())) > 1
        assert 3 < average(model, bits) <= 3.5
        artefact = load_compressed(MLP, callback.artifact)
        x = MLP.inputs(32)[0]
        with torch.no_grad():
            expected = model.eval()(x)
            assert (artefact(x) - expected).norm() < 0.02 * expected.norm()
        assert all(layer.spec["sensitivity"] for layer in compressed_layers(artefact).values())

    def test_pins_hold_there_too(self) -> None:
        method = QATCompression(average_bits=4, overrides={"tail": {"weight_bits": 8}}, min_saving=0.0)
        assert bits_of(method.plan(network(), context()))["tail"] == 8
        with pytest.raises(OptionError, match="goes without weight_bits"):
            QATCompression(average_bits=4, weight_bits=4)
