"""Every option of the quantization methods shows its effect in numbers, through the functions and the callbacks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from pquant_lightning import (
    PTQCallback,
    PTQCompression,
    QATCallback,
    QATCompression,
    QuantizationCompression,
    compress_model,
    compression_report,
    finalize,
    load_compressed,
)
from pquant_lightning.core.compressed_layer import compressed_layers
from pquant_lightning.core.errors import CalibrationError, ModelError, OptionError
from pquant_lightning.methods.quantization.qat import bits_in_force
from tests.integration.test_traps_runtime import SGDMLP
from tests.models import MLP, ConvNet, Transformer, fit, quiet_trainer


def trained_conv_net() -> ConvNet:
    torch.manual_seed(0)
    model = ConvNet()
    for seed in range(8):
        model.train()(ConvNet.inputs(64, seed=seed)[0] * 2 + 1)
    return model.eval()


def conv_loader() -> list[Any]:
    return [(ConvNet.inputs(32, seed=seed)[0] * 2 + 1, torch.zeros(32)) for seed in range(10)]


def error(model: nn.Module, small: nn.Module, x: torch.Tensor) -> float:
    with torch.no_grad():
        expected = model(x)
        return float((small(x) - expected).norm() / expected.norm())


def specs(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: layer.spec for name, layer in compressed_layers(model).items()}


class TestPTQ:
    X = ConvNet.inputs(64, seed=99)[0] * 2 + 1

    @pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
    def test_schemes(self, scheme: str) -> None:
        model = trained_conv_net()
        small = compress_model(model, "ptq", train_loader=conv_loader(), scheme=scheme, min_saving=0.0)
        assert {spec.get("act") for name, spec in specs(small).items() if "bn" not in name} == {
            None if scheme == "weight_only" else scheme
        }
        assert 0 < error(model, small, self.X) < (0.005 if scheme == "weight_only" else 0.05)

    def test_fewer_bits_lose_more_and_groups_less(self) -> None:
        model, x = MLP(), MLP.inputs(64)[0]
        errors = {
            (bits, group): error(
                model,
                compress_model(
                    model,
                    "ptq",
                    bits=bits,
                    scheme="weight_only",
                    group_size=group,
                    first_last_bits=bits,
                    min_saving=0.0,
                ),
                x,
            )
            for bits in (2, 4, 8)
            for group in (None, 8)
        }
        assert errors[2, None] > errors[4, None] > errors[8, None] > 0
        assert errors[2, 8] < errors[2, None]
        assert errors[4, 8] < errors[4, None]

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_weights_take_their_bits(self, bits: int) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        small = compress_model(model, "ptq", bits=bits, scheme="weight_only")
        assert small[0].codes.numel() == 64 * 64 * bits // 8

    def test_first_and_last_layers_keep_eight_bits(self) -> None:
        def bits(**options: Any) -> list[int]:
            small = compress_model(MLP(), "ptq", bits=4, scheme="weight_only", min_saving=0.0, **options)
            return [spec["bits"] for spec in specs(small).values()]

        assert bits() == [8, 4, 8]
        assert bits(first_last_bits=6) == [6, 4, 6]
        assert bits(group_size=8) == [4, 4, 4]
        assert bits(overrides={"head": {"bits": 3}}) == [8, 4, 3]

    def test_overrides_name_layers_and_options_that_exist(self) -> None:
        with pytest.raises(ModelError, match="'haed' matches no layer.*'head'"):
            compress_model(MLP(), "ptq", scheme="dynamic", overrides={"haed": {"bits": 4}})
        with pytest.raises(OptionError, match="no option 'bitz'.*'bits'"):
            PTQCompression(overrides={"head": {"bitz": 4}})
        with pytest.raises(OptionError, match="int in 2..8"):
            PTQCompression(overrides={"head": {"bits": 9}})

    def test_norms_are_folded_exactly(self) -> None:
        model = trained_conv_net()
        folded, kept = (
            compress_model(
                model, "ptq", train_loader=conv_loader(), scheme="weight_only", min_saving=0.0, fold_norms=fold
            )
            for fold in (True, False)
        )
        assert (specs(folded)["bn1"]["kind"], "bn1" in specs(kept)) == ("folded_norm", False)
        with torch.no_grad():
            torch.testing.assert_close(folded(self.X), kept(self.X), rtol=1e-4, atol=1e-5)

    def test_bias_correction_corrects_the_mean_output(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        loader = [torch.rand(64, 64) for _ in range(5)]
        x = torch.rand(500, 64)

        def shift(correct_bias: bool) -> float:
            small = compress_model(
                model,
                "ptq",
                train_loader=loader,
                bits=3,
                scheme="weight_only",
                rounding="nearest",
                correct_bias=correct_bias,
            )
            with torch.no_grad():
                return float((small(x) - model(x)).mean(0).norm())

        assert shift(True) < 0.5 * shift(False)

    @pytest.mark.parametrize("observer", ["histogram", "minmax", "moving_average", "percentile", "mse", "entropy"])
    def test_observers_clip_an_outlier_or_not(self, observer: str) -> None:
        torch.manual_seed(0)
        x = torch.randn(300, 64)
        x[7, 7] = 100.0
        small = compress_model(nn.Sequential(nn.Linear(64, 64)), "ptq", train_loader=[x], observer=observer, act_bits=4)
        reach = float(small[0].act_grid[0] * (15 - small[0].act_grid[1]))
        assert (reach > 90) == (observer in ("minmax", "moving_average", "percentile"))

    def test_the_number_of_samples_counts(self) -> None:
        loader = [torch.full((10, 64), float(step)) for step in range(1, 6)]

        def reach(num_samples: int) -> float:
            model = nn.Sequential(nn.Linear(64, 64))
            small = compress_model(model, "ptq", train_loader=loader, observer="minmax", num_samples=num_samples)
            return round(float(small[0].act_grid[0]) * 255, 3)

        assert (reach(10), reach(30), reach(50)) == (1.0, 3.0, 5.0)

    def test_options_that_exclude_each_other(self) -> None:
        with pytest.raises(OptionError, match="weight_only.*act_bits=8"):
            PTQCompression(scheme="weight_only", act_bits=8)
        with pytest.raises(OptionError, match="num_samples is at least 1"):
            PTQCompression(num_samples=0)
        with pytest.raises(CalibrationError, match="train_loader"):
            compress_model(MLP(), "ptq")

    @pytest.mark.parametrize("bits", [1, 9, 0, -4])
    def test_bits_outside_the_range(self, bits: int) -> None:
        with pytest.raises(OptionError, match=rf"int in 2..8.*got {bits}"):
            PTQCompression(bits=bits)


class TestBadData:
    def test_an_empty_loader_says_how_many_samples(self) -> None:
        with pytest.raises(CalibrationError, match="hold 0 samples"):
            compress_model(MLP(), "ptq", train_loader=[])

    def test_a_small_loader_is_used_with_a_warning(self, package_log: Any) -> None:
        compress_model(MLP(), "ptq", train_loader=[MLP.inputs(7)[0]], min_saving=0.0)
        assert "only 7 samples, and 300 were asked for" in package_log.text

    def test_batches_that_do_not_fit(self) -> None:
        with pytest.raises(CalibrationError, match=r"MLP cannot be run.*float32 \(8, 5\)"):
            compress_model(MLP(), "ptq", train_loader=[torch.randn(8, 5)])
        with pytest.raises(CalibrationError, match="cannot be run.*a dict of image"):
            compress_model(MLP(), "ptq", train_loader=[{"image": torch.randn(8, 16), "label": torch.zeros(8)}])

    def test_dicts_with_the_names_of_the_arguments(self) -> None:
        batch = {"x": MLP.inputs(64)[0], "label": torch.zeros(64)}
        assert specs(compress_model(MLP(), "ptq", train_loader=[batch], min_saving=0.0))

    def test_nan_activations_name_the_layer(self) -> None:
        x = MLP.inputs(64)[0]
        x[3, 3] = torch.nan
        with pytest.raises(CalibrationError, match="'fc1' hold NaN"):
            compress_model(MLP(), "ptq", train_loader=[x], min_saving=0.0)

    @pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
    def test_constant_activations_are_kept_exactly(self, value: float) -> None:
        model = nn.Sequential(nn.Linear(64, 64))
        x = torch.full((32, 64), value)
        small = compress_model(model, "ptq", train_loader=[x])
        assert torch.isfinite(small(x)).all()
        assert error(model, small, x) < 0.01

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_models(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)).to(dtype)
        x = torch.randn(64, 64, dtype=dtype)
        small = compress_model(model, "ptq", train_loader=[x])
        assert small(x).dtype == dtype
        assert error(model, small, x) < 0.05

    def test_integer_inputs_are_explained(self) -> None:
        small = compress_model(nn.Sequential(nn.Linear(64, 64)), "ptq", train_loader=[torch.randn(64, 64)])
        with pytest.raises(ModelError, match="floating-point inputs, got torch.int64"):
            small(torch.ones(2, 64, dtype=torch.long))

    def test_a_layer_that_is_never_reached_stays_and_is_named(self, package_log: Any) -> None:
        class Half(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.used(x)

        model = Half()
        small = compress_model(model, "ptq", train_loader=[torch.randn(64, 64)])
        assert "never reached layer 'unused'" in package_log.text
        assert small.used.deployed
        assert torch.equal(small.unused.weight, model.unused.weight)
        rows = {layer.name: layer for layer in compression_report(model, small).layers}
        assert "calibration has not reached it" in rows["unused"].method
        assert rows["unused"].size_bytes[0] <= rows["unused"].size_bytes[1]


class TestPTQInTrainer:
    def test_the_model_stays_float_and_the_artefact_is_integer(self, tmp_path: Path) -> None:
        callback = PTQCallback()
        model = fit(quiet_trainer(tmp_path, [callback]), ConvNet())
        x = ConvNet.inputs(64)[0]
        plain = ConvNet()
        plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
        assert torch.equal(model.eval()(x), plain.eval()(x))
        artefact = load_compressed(ConvNet, callback.artifact)
        assert artefact.conv1.codes.dtype == torch.int8
        assert artefact.bn1.kind == "folded_norm"
        assert 0 < error(plain, artefact, x) < 0.1
        torch.testing.assert_close(finalize(model)(x), artefact(x))

    @pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
    def test_precisions(self, precision: Any, tmp_path: Path) -> None:
        callback = PTQCallback()
        model = fit(quiet_trainer(tmp_path, [callback], precision=precision), SGDMLP())
        x = MLP.inputs(64)[0].to(model.fc1.weight.dtype)
        assert error(model.eval(), load_compressed(SGDMLP, callback.artifact), x) < 0.1

    def test_testing_the_best_keeps_what_was_measured(self, tmp_path: Path) -> None:
        best = ModelCheckpoint(tmp_path, monitor="val_loss")
        trainer = quiet_trainer(tmp_path, [PTQCallback(), best], max_epochs=3)
        model = fit(trainer, MLP())
        trainer.test(model, MLP.loader(seed=2), ckpt_path="best", verbose=False)
        assert error(model.eval(), finalize(model), MLP.inputs(64)[0]) < 0.1

    def test_a_checkpoint_from_the_middle_cannot_be_finalized(self, tmp_path: Path) -> None:
        fit(quiet_trainer(tmp_path, [PTQCallback(), ModelCheckpoint(tmp_path, filename="middle")]), MLP())
        with pytest.raises(ModelError, match="not been calibrated.*artefact"):
            finalize(load_compressed(MLP, tmp_path / "middle.ckpt"))


class WithoutForward(MLP):
    """Computes in its steps only."""

    forward = torch.nn.Module.forward

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(MLP.forward(self, batch[0]), batch[1])


class WithPredictStep(WithoutForward):
    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return MLP.forward(self, batch[0])


class TestModulesWithoutForward:
    @pytest.mark.parametrize(
        "callback", [PTQCallback(), PTQCallback(scheme="dynamic"), QATCallback()], ids=["static", "dynamic", "qat"]
    )
    def test_calibration_runs_the_training_step(self, callback: Any, tmp_path: Path, package_log: Any) -> None:
        model = fit(quiet_trainer(tmp_path, [callback]), WithoutForward())
        assert "Calibration runs WithoutForward.training_step" in package_log.text
        assert all(layer.deployed for layer in compressed_layers(finalize(model)).values())

    def test_predict_step_says_what_to_run(self, tmp_path: Path) -> None:
        callback = PTQCallback()
        model = fit(quiet_trainer(tmp_path, [callback]), WithPredictStep())
        x = MLP.inputs(64)[0]
        artefact = load_compressed(WithPredictStep, callback.artifact)
        assert artefact.fc1.deployed
        expected, found = (MLP.forward(net.eval(), x).detach() for net in (model, artefact))
        assert (found - expected).norm() < 0.05 * expected.norm()


class TestQAT:
    @pytest.mark.parametrize(
        ("options", "weights", "inputs"),
        [
            ({"bits": 8}, "ste", "ste"),
            ({"bits": 4, "first_last_bits": 4}, "lsq", "lsq"),
            ({"weight_bits": 2, "act_bits": 8, "first_last_bits": 2}, "lsq", "ste"),
            ({"bits": 4, "quantizer": "ste"}, "ste", "ste"),
            ({"quantizer": "lsq"}, "lsq", "lsq"),
            ({"quantizer": "pact"}, "ste", "pact"),
        ],
    )
    def test_quantizers(self, options: dict[str, Any], weights: str, inputs: str, package_log: Any) -> None:
        spec = compress_model(MLP(), "qat", min_saving=0.0, **options).fc2.spec
        assert (spec["weight_quantizer"], spec["act_quantizer"]) == (weights, inputs)
        learned = "ste" not in (weights, inputs) or weights != inputs
        assert ("with learned scales" in package_log.text) == learned
        assert ("with scales from the ranges of values" in package_log.text) != learned

    @pytest.mark.parametrize("quantizer", ["lsq", "pact"])
    def test_learned_scales_move_in_a_group_of_their_own(self, quantizer: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        callback = QATCallback(bits=4, quantizer=quantizer, scale_lr=0.5)
        trainer = quiet_trainer(tmp_path, [callback], max_epochs=2)
        model = MLP()
        before: dict[str, torch.Tensor] = {}

        original = model.on_train_start
        model.on_train_start = lambda: before.update(act=model.fc2.act_scale.detach().clone()) or original()  # type: ignore[method-assign]
        fit(trainer, model)
        weights, scales = trainer.optimizers[0].param_groups
        assert scales["lr"] == 0.5 * weights["lr"]
        assert any(p is model.fc2.act_scale for p in scales["params"])
        assert not torch.equal(model.fc2.act_scale, before["act"])
        x = MLP.inputs(64)[0]
        assert error(model.eval(), finalize(model), x) < 1e-3

    def test_ranges_start_from_calibration_or_from_the_first_batch(self, tmp_path: Path) -> None:
        calibrated = compress_model(MLP(), "qat", train_loader=MLP.loader(), min_saving=0.0)
        blind = compress_model(MLP(), "qat", train_loader=MLP.loader(), num_samples=0, min_saving=0.0)
        x = torch.cat([batch[0] for batch in MLP.loader()])
        low, high = calibrated.fc1.act_range.tolist()
        assert x.min() <= low < 0 < high <= x.max()
        assert blind.fc1.act_range.tolist() == [torch.inf, -torch.inf]

    def test_bits_in_force_follow_the_schedule(self) -> None:
        spec = compress_model(MLP(), "qat", bits=4, start=0.2, initial_bits=8, end=0.6, min_saving=0.0).fc2.spec
        assert [bits_in_force(spec, p)[0] for p in (0.0, 0.19, 0.2, 0.4, 0.6, 1.0)] == [16, 16, 8, 6, 4, 4]

    def test_before_the_start_it_computes_in_floating_point(self) -> None:
        model, x = MLP(), MLP.inputs(64)[0]
        method = QATCompression(bits=4, start=0.5, min_saving=0.0)
        small = method.compress(model)
        small.train()(x)
        assert torch.equal(small.eval()(x), model.eval()(x))
        method.step(small, {}, 0.49)
        assert torch.equal(small(x), model(x))
        method.step(small, {}, 0.5)
        assert 0.01 < error(model, small, x) < 0.5

    def test_a_checkpoint_knows_the_bits_in_force(self, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, [QATCallback(bits=4, start=0.4)], max_epochs=3)
        early = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, monitor="val_loss")
        trainer.callbacks.append(early)
        model = fit(trainer, MLP())
        loaded = [load_compressed(MLP, tmp_path / f"epoch={epoch}.ckpt") for epoch in (0, 2)]
        assert [m.fc2.bits_in_force for m in loaded] == [(16, 16), (4, 4)]
        resumed = fit(
            quiet_trainer(tmp_path, [QATCallback(bits=4, start=0.4)], max_epochs=3),
            MLP(),
            ckpt_path=tmp_path / "epoch=0.ckpt",
        )
        assert resumed.fc2.bits_in_force == model.fc2.bits_in_force == (4, 4)

    def test_observers_and_norms_stand_still_late(self) -> None:
        model = trained_conv_net()
        method = QATCompression(freeze_observers=0.3, freeze_norms=0.6, min_saving=0.0)
        small = method.compress(model, conv_loader()).train()
        x = 5 * ConvNet.inputs(32)[0]

        def moved(progress: float) -> tuple[bool, bool]:
            small.train()
            method.step(small, {}, progress)
            ranges, means = small.conv2.act_range.clone(), small.bn1.running_mean.clone()
            small(x)
            return not torch.equal(small.conv2.act_range, ranges), not torch.equal(small.bn1.running_mean, means)

        assert [moved(progress) for progress in (0.0, 0.4, 0.7)] == [(True, True), (False, True), (False, False)]

    @pytest.mark.parametrize("model_class", [MLP, ConvNet, Transformer])
    @pytest.mark.parametrize("options", [{}, {"bits": 3}, {"quantizer": "pact"}])
    def test_what_was_trained_is_deployed(self, model_class: Any, options: dict[str, Any], tmp_path: Path) -> None:
        model = fit(quiet_trainer(tmp_path, [QATCallback(min_saving=0.0, **options)], max_epochs=2), model_class())
        inputs = model_class.inputs(64)
        final = finalize(model)
        with torch.no_grad():
            expected, found = model.eval()(*inputs), final(*inputs)
        assert (found - expected).norm() < 0.02 * expected.norm()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"start": 1.5}, r"start is a share.*1.5"),
            ({"start": 1.0}, "never round"),
            ({"initial_bits": 8, "start": 0.5, "end": 0.4}, "between start and end"),
            ({"initial_bits": 12}, "initial_bits is an int in 2..8"),
            ({"scale_lr": 0.0}, "positive factor"),
            ({"quantizer": "lsqq"}, "no quantizer 'lsqq'.*'lsq'"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(OptionError, match=message):
            QATCompression(**options)


class TestFamily:
    def test_it_makes_the_method_it_names(self) -> None:
        assert isinstance(QuantizationCompression({"bits": 4}), PTQCompression)
        assert isinstance(QuantizationCompression(bits=4, method="qat"), QATCompression)
        with pytest.raises(OptionError, match="no method 'qad'.*'qat'"):
            QuantizationCompression(method="qad")

    def test_the_configuration_runs(self) -> None:
        config = {"compression": {"methods": ["quantization"], "quantization": {"bits": 8, "method": "ptq"}}}
        model = copy.deepcopy(MLP())
        small = compress_model(model, config, train_loader=MLP.loader())
        assert any(layer.deployed for layer in compressed_layers(small).values())
