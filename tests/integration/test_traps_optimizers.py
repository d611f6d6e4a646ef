"""Traps of training: optimizers made too early, frozen layers, nothing to train, finalized models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from pquant_lightning import LowRankCallback, QATCallback, finalize
from pquant_lightning.core.errors import ModelError
from tests.integration._helpers import LOW_RANK, STACK, AtStart, assert_all_trained, assert_equal, kinds, stack, tensors
from tests.models import MLP, SmallData, fit, quiet_trainer


class WithoutOptimizer(MLP):
    """Leaves the optimizer to the command line."""

    configure_optimizers = LightningModule.configure_optimizers


@pytest.mark.parametrize("scheduler", [(), ("--lr_scheduler=StepLR", "--lr_scheduler.step_size=1")])
def test_the_command_lines_optimizer_trains_the_factors(tmp_path: Path, scheduler: tuple[str, ...]) -> None:
    """LightningCLI makes `--optimizer` from `model.parameters()` before any callback runs."""
    start = AtStart()
    flags = "max_epochs=1 accelerator=cpu devices=1 logger=false enable_progress_bar=false enable_model_summary=false"
    arguments = ["fit", "--optimizer=Adam", "--optimizer.lr=0.01", f"--trainer.default_root_dir={tmp_path}", *scheduler]
    arguments += [f"--trainer.{flag}" for flag in flags.split()]
    arguments += [
        "--trainer.callbacks=LowRankCallback",
        "--trainer.callbacks.rank=4",
        "--trainer.callbacks+=QATCallback",
    ]
    cli = LightningCLI(
        WithoutOptimizer, SmallData, args=arguments, trainer_defaults={"callbacks": [start]}, save_config_callback=None
    )
    assert kinds(cli.model) == STACK
    assert_all_trained(cli.model, start)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.001 if scheduler else 0.01)


class EarlyOptimizer(MLP):
    """Its optimizer is made in `__init__`, with a learning rate for each layer."""

    def __init__(self) -> None:
        super().__init__()
        rates = {self.fc1: 0.1, self.fc2: 0.01, self.head: 0.001}
        groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in rates.items()]
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer


def test_early_parameter_groups_keep_their_learning_rates(tmp_path: Path) -> None:
    start, model = AtStart(), EarlyOptimizer()
    fit(quiet_trainer(tmp_path, [*stack(), start]), model)
    assert kinds(model) == STACK
    assert_all_trained(model, start)
    names = {id(p): name for name, p in model.named_parameters()}
    layers = {
        group["lr"]: {names[id(p)].split(".")[0] for p in group["params"]} for group in model.optimizer.param_groups
    }
    assert layers == {0.1: {"fc1"}, 0.01: {"fc2"}, 0.001: {"head"}}


def test_an_early_optimizer_resumes_with_each_parameters_own_state(tmp_path: Path) -> None:
    trainer, model = quiet_trainer(tmp_path, stack()), EarlyOptimizer()
    fit(trainer, model)
    trainer.save_checkpoint(tmp_path / "early.ckpt")
    momenta = {name: model.optimizer.state[p]["momentum_buffer"].clone() for name, p in model.named_parameters()}

    start, resumed = AtStart(), EarlyOptimizer()
    fit(quiet_trainer(tmp_path, [*stack(), start], max_epochs=1), resumed, ckpt_path=tmp_path / "early.ckpt")
    assert kinds(resumed) == STACK
    found = {name: resumed.optimizer.state[p]["momentum_buffer"] for name, p in resumed.named_parameters()}
    assert_equal(found, momenta)

    fit(quiet_trainer(tmp_path, [*stack(), start], max_epochs=2), EarlyOptimizer(), ckpt_path=tmp_path / "early.ckpt")


class ForgetfulMLP(MLP):
    """Trains only its head, without freezing the rest."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def test_a_parameter_in_no_optimizer_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'fc1\.first\.weight' .* is in no optimizer.*requires_grad_\(False\)"):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), ForgetfulMLP())


def test_the_factors_of_a_frozen_layer_are_frozen_and_do_not_move(tmp_path: Path) -> None:
    model, start = MLP(), AtStart()
    model.fc1.requires_grad_(False)
    fit(quiet_trainer(tmp_path, [*stack(), start], max_epochs=2), model)
    assert kinds(model) == STACK
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"fc1.first.weight", "fc1.second.weight", "fc1.second.bias"}
    unmoved = {name for name, p in model.named_parameters() if torch.equal(p, start.parameters[name])}
    assert unmoved == frozen


def test_only_the_bias_frozen_stays_so(tmp_path: Path) -> None:
    model, start = MLP(), AtStart()
    model.fc1.bias.requires_grad_(False)
    fit(quiet_trainer(tmp_path, [*stack(), start]), model)
    assert kinds(model) == STACK
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc1.second.bias"]
    assert torch.equal(model.fc1.second.bias, start.parameters["fc1.second.bias"])


class RefusesOptimizers(MLP):
    """Whoever asks it for optimizers has come too late."""

    def configure_optimizers(self) -> Any:
        pytest.fail("the optimizers were made before the check")


@pytest.mark.parametrize("callback", [LowRankCallback(rank=4), QATCallback()])
def test_nothing_to_train_is_an_error_before_the_optimizers(tmp_path: Path, callback: Callback) -> None:
    with pytest.raises(ModelError, match=r"RefusesOptimizers has no parameter to train.*requires_grad_\(True\)"):
        fit(quiet_trainer(tmp_path, [callback]), RefusesOptimizers().requires_grad_(False))


def test_fitting_a_finalized_model_is_an_error_that_names_the_remedy(tmp_path: Path) -> None:
    model = finalize(fit(quiet_trainer(tmp_path, stack()), RefusesLater()))
    assert set(kinds(model).values()) == {"low_rank_linear", "int_linear"}
    model.refuses = True
    before = tensors(model)
    for callbacks in (stack(), [QATCallback()]):
        with pytest.raises(ModelError, match=r"RefusesLater is finalized.*load a checkpoint of the fit \(\.ckpt\)"):
            fit(quiet_trainer(tmp_path, callbacks), model)
        assert_equal(tensors(model), before)


class RefusesLater(MLP):
    """Gives optimizers until it is told not to."""

    refuses = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert not self.refuses, "the optimizers were made before the check"
        return super().configure_optimizers()


def test_a_finalized_model_of_which_nothing_is_in_integers_trains_on(tmp_path: Path) -> None:
    model = finalize(fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), MLP()))
    assert kinds(model) == LOW_RANK
    start = AtStart()
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4), start]), model)
    assert_all_trained(model, start)


def test_layers_shared_by_two_optimizers_stay_with_their_own(tmp_path: Path) -> None:
    """Manual optimization with two early optimizers: each gets the factors of its own layers."""

    class TwoOptimizers(MLP):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.pair = [
                torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.fc1, nn.Sequential(self.fc2, self.head))
            ]

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return self.pair

        def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
            loss = self.loss(batch)
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

    start, model = AtStart(), TwoOptimizers()
    fit(quiet_trainer(tmp_path, [*stack(), start]), model)
    assert kinds(model) == STACK
    assert_all_trained(model, start)
    names = {id(p): name for name, p in model.named_parameters()}
    owned = [{names[id(p)].split(".")[0] for p in optimizer.param_groups[0]["params"]} for optimizer in model.pair]
    assert owned == [{"fc1"}, {"fc2", "head"}]
