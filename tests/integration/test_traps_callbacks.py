"""Traps of several callbacks and several fits: order, copies of the model, names, nothing matched, re-use, errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

from pquant_lightning import LowRankCallback, QATCallback, compress_model, load_compressed
from pquant_lightning.core.errors import CallbackOrderError, ModelError
from tests.integration._helpers import LOW_RANK, QAT, STACK, assert_equal, kinds, stack, tensors
from tests.models import MLP, fit, quiet_trainer


def assert_refused(directory: Path, callbacks: list[Callback], error: type[Exception], match: str) -> None:
    """The fit fails with that message, and the model is what it was."""
    model = MLP()
    before = tensors(model)
    with pytest.raises(error, match=match):
        fit(quiet_trainer(directory, callbacks), model)
    assert kinds(model) == {}
    assert_equal(tensors(model), before)
    assert "configure_model" not in vars(model)


class TestOrder:
    def test_quantization_before_low_rank_is_an_error_with_the_right_order(self, tmp_path: Path) -> None:
        right = r"callbacks=\[LowRankCallback\(low_rank\), QATCallback\(qat\)\]"
        assert_refused(tmp_path, [QATCallback(), LowRankCallback(rank=4)], CallbackOrderError, right)

    @pytest.mark.parametrize("make", [EMAWeightAveraging, WeightAveraging, StochasticWeightAveraging])
    @pytest.mark.parametrize("position", [0, 1])
    def test_a_callback_that_copies_the_model_stands_after_ours(
        self, tmp_path: Path, make: Callable[..., Callback], position: int
    ) -> None:
        copying = make(swa_lrs=0.01) if make is StochasticWeightAveraging else make()
        callbacks = stack()
        callbacks.insert(position, copying)
        right = rf"callbacks=\[LowRankCallback\(low_rank\), QATCallback\(qat\), {type(copying).__name__}\]"
        assert_refused(tmp_path, callbacks, CallbackOrderError, right)


class RecordSteps(Callback):
    """Keeps the trained parameters after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


class TestAveraging:
    @staticmethod
    def ema() -> WeightAveraging:
        return WeightAveraging(avg_fn=get_ema_avg_fn(0.5))

    def test_the_averaged_model_is_the_average_of_the_trained_factors(self, tmp_path: Path) -> None:
        record = RecordSteps()
        model = fit(quiet_trainer(tmp_path, [*stack(), self.ema(), record], max_epochs=2), MLP())
        assert kinds(model) == STACK
        assert len(record.steps) == 8
        average = record.steps[0]
        for step in record.steps[1:]:
            average = {name: 0.5 * average[name] + 0.5 * step[name] for name in average}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), average[name])
            assert not torch.equal(parameter.detach(), record.steps[-1][name])

    def test_its_checkpoint_loads_and_resumes(self, tmp_path: Path) -> None:
        trainer, path = quiet_trainer(tmp_path, [*stack(), self.ema()]), tmp_path / "ema.ckpt"
        model = fit(trainer, MLP())
        trainer.save_checkpoint(path)
        torch.load(path, weights_only=True)
        assert_equal(tensors(load_compressed(MLP, path)), tensors(model))

        trainer = quiet_trainer(tmp_path, [*stack(), self.ema()], max_epochs=2)
        resumed = fit(trainer, MLP(), ckpt_path=path)
        assert trainer.global_step == 8
        assert kinds(resumed) == STACK
        assert not torch.equal(resumed.head.weight, model.head.weight)

    def test_ranges_and_specs_are_not_averaged_into_nonsense(self, tmp_path: Path) -> None:
        model = fit(quiet_trainer(tmp_path, [*stack(), self.ema()], max_epochs=3), MLP())
        assert kinds(model) == STACK
        for layer in (model.fc1.first, model.head):
            low, high = layer.act_range.tolist()
            assert -100 < low < high < 100
            assert layer.spec["bits"] == 8

    def test_stochastic_weight_averaging_after_ours(self, tmp_path: Path) -> None:
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        model = fit(quiet_trainer(tmp_path, [*stack(), swa], max_epochs=3), MLP())
        assert kinds(model) == STACK


class TestNames:
    def test_two_callbacks_of_one_class_need_names(self, tmp_path: Path) -> None:
        callbacks = [LowRankCallback(rank=4, include=["fc1"]), LowRankCallback(rank=8, include=["fc2"])]
        with pytest.raises(RuntimeError, match="more than one stateful callback of type `LowRankCallback`"):
            quiet_trainer(tmp_path, callbacks)

    def test_with_names_both_act_in_three_fits_and_on_resume(self, tmp_path: Path) -> None:
        def callbacks() -> list[Callback]:
            narrow = LowRankCallback(name="narrow", rank=4, include=["fc1"])
            wide = LowRankCallback(name="wide", rank=8, include=["fc2"])
            return [narrow, wide, QATCallback()]

        model = MLP()
        for _ in range(3):
            trainer = quiet_trainer(tmp_path, callbacks())
            fit(trainer, model)
            assert kinds(model) == STACK
            assert (model.fc1.spec["rank"], model.fc2.spec["rank"]) == (4, 8)
        trainer.save_checkpoint(tmp_path / "named.ckpt")

        trainer = quiet_trainer(tmp_path, callbacks(), max_epochs=2)
        resumed = fit(trainer, MLP(), ckpt_path=tmp_path / "named.ckpt")
        assert kinds(resumed) == STACK
        assert (resumed.fc1.spec["rank"], resumed.fc2.spec["rank"]) == (4, 8)


class TestNothingMatched:
    def test_no_layer_is_an_error_that_gives_the_reasons(self, tmp_path: Path) -> None:
        match = r"low_rank changes no layer of MLP:\n  fc1: .* bytes instead of .*\n  fc2: .*\n  head: "
        assert_refused(tmp_path, [LowRankCallback(rank=64)], ModelError, match)

    @pytest.mark.parametrize("option", ["include", "exclude"])
    def test_a_pattern_that_matches_nothing_names_the_nearest_layers(self, tmp_path: Path, option: str) -> None:
        match = rf"{option} pattern 'fd1' matches no layer.*Did you mean 'fc1'"
        assert_refused(tmp_path, [LowRankCallback(rank=4, **{option: ["fd1"]})], ModelError, match)

    def test_a_model_without_layers(self) -> None:
        with pytest.raises(ModelError, match="it has no such layers"):
            compress_model(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), "low_rank", rank=4)


class TestFitAgain:
    def test_later_fits_never_decide_again(self, tmp_path: Path) -> None:
        """After each fit the layer first left alone gets a spectrum that low rank would have taken."""
        model = MLP()
        nn.init.orthogonal_(model.head.weight)  # a flat spectrum: any low rank loses too much
        seen = []
        for _ in range(5):
            fit(quiet_trainer(tmp_path, [LowRankCallback(energy=0.8), QATCallback()]), model)
            seen.append({name: layer.spec for name, layer in model.named_modules() if name in kinds(model)})
            with torch.no_grad():
                model.head.weight.copy_(torch.ones(4, 1) @ torch.ones(1, 24))
        assert seen[0]["fc1"]["kind"] == "low_rank_linear"
        assert seen[0]["head"]["kind"] == "quant_linear"
        assert seen == [seen[0]] * 5

    def test_callbacks_serve_a_second_model(self, tmp_path: Path) -> None:
        callbacks = stack()
        first, second = (fit(quiet_trainer(tmp_path, callbacks), MLP()) for _ in range(2))
        assert kinds(first) == kinds(second) == STACK
        assert not torch.equal(first.fc1.first.weight, second.fc1.first.weight)

    def test_a_trainer_serves_a_second_model(self, tmp_path: Path) -> None:
        trainer = quiet_trainer(tmp_path, stack())
        assert kinds(fit(trainer, MLP())) == STACK
        assert kinds(fit(trainer, MLP())) == STACK

    def test_a_model_serves_a_second_trainer_with_one_more_callback(self, tmp_path: Path) -> None:
        model = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), MLP())
        assert kinds(model) == LOW_RANK
        assert kinds(fit(quiet_trainer(tmp_path, stack()), model)) == STACK

    def test_a_model_compressed_outside_of_a_trainer_is_fitted_with_the_next_callback(self, tmp_path: Path) -> None:
        model = compress_model(MLP(), "low_rank", rank=4)
        assert kinds(model) == LOW_RANK
        assert kinds(fit(quiet_trainer(tmp_path, [QATCallback()]), model)) == STACK

    def test_the_stage_is_not_applied_twice(self, tmp_path: Path) -> None:
        model = compress_model(MLP(), "qat")
        assert kinds(model) == QAT
        with pytest.raises(ModelError, match=r"qat changes no layer of MLP:\n  fc1: already compressed \(8-bit"):
            fit(quiet_trainer(tmp_path, [QATCallback(bits=4)]), model)


class Broken(Callback):
    """Fails in `setup`."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        raise OSError("no space left on device")


class TestAnotherCallbackFails:
    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_no_trace_stays_on_the_module(self, tmp_path: Path, position: int) -> None:
        model, callbacks = MLP(), stack()
        before = tensors(model)
        callbacks.insert(position, Broken())
        with pytest.raises(OSError, match="no space left"):
            fit(quiet_trainer(tmp_path, callbacks), model)
        assert "configure_model" not in vars(model)
        assert_equal(tensors(model), before)
        assert kinds(fit(quiet_trainer(tmp_path, stack()), model)) == STACK

    def test_the_users_own_configure_model_on_the_instance_is_put_back(self, tmp_path: Path) -> None:
        calls = []

        def own() -> None:
            calls.append("own")

        model = MLP()
        model.configure_model = own
        with pytest.raises(OSError, match="no space left"):
            fit(quiet_trainer(tmp_path, [*stack(), Broken()]), model)
        assert vars(model)["configure_model"] is own
        assert kinds(fit(quiet_trainer(tmp_path, [QATCallback()]), model)) == QAT
        assert calls == ["own"]
        assert vars(model)["configure_model"] is own
