"""What went wrong in Lightning's own compression callbacks, as tests; the number is the pytorch-lightning issue."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from pquant_lightning import finalize, load_compressed
from pquant_lightning.core.partial import HINT
from tests.integration._helpers import STACK, assert_equal, kinds, stack, tensors
from tests.models import MLP, fit, quiet_trainer


def fitted(model: MLP, tmp_path: Path) -> Trainer:
    """Fits with [LowRank, QAT] and a monitored checkpoint; returns the trainer."""
    monitor = ModelCheckpoint(dirpath=tmp_path / "checkpoints", monitor="val_loss", save_last=True)
    trainer = quiet_trainer(tmp_path, [*stack(), monitor])
    fit(trainer, model)
    assert kinds(model) == STACK
    return trainer


def test_6457_a_mid_training_checkpoint_loads_and_resumes(tmp_path: Path) -> None:
    every_step = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    model = fit(quiet_trainer(tmp_path, [*stack(), every_step], max_epochs=2), MLP())
    assert kinds(model) == STACK
    middle = tmp_path / "step=3.ckpt"
    saved = torch.load(middle, weights_only=True)["state_dict"]
    del saved[HINT]

    assert_equal(tensors(load_compressed(MLP, middle)), saved)

    trainer = quiet_trainer(tmp_path, stack(), max_epochs=2)
    resumed = fit(trainer, MLP(), ckpt_path=middle)
    assert trainer.global_step == 8
    assert kinds(resumed) == STACK
    assert not torch.equal(resumed.fc1.first.weight, saved["fc1.first.weight"])


@pytest.mark.parametrize("ckpt_path", ["best", "last"])
@pytest.mark.parametrize("inplace", [False, True])
def test_12896_test_of_a_checkpoint_after_conversion(tmp_path: Path, ckpt_path: str, inplace: bool) -> None:
    model = MLP()
    trainer = fitted(model, tmp_path)
    (expected,) = trainer.test(model, MLP.loader(seed=2), ckpt_path=ckpt_path, verbose=False)

    deployed = finalize(model, inplace=inplace)
    assert set(kinds(deployed).values()) == {"low_rank_linear", "int_linear"}
    (found,) = trainer.test(deployed, MLP.loader(seed=2), ckpt_path=ckpt_path, verbose=False)
    assert found == expected
    assert kinds(deployed) == STACK  # back in training form, as in the file


class KeywordMLP(MLP):
    """A forward with positional, defaulted and keyword-only arguments."""

    def forward(self, x: Tensor, offset: float = 0.0, *, scale: float = 1.0) -> Tensor:
        return super().forward(x) * scale + offset

    def loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        x, target = batch
        return torch.nn.functional.cross_entropy(self(x=x, scale=2.0), target)


@pytest.mark.parametrize("issue", ["15862", "7926"])
def test_15862_7926_forward_keeps_its_keyword_arguments(tmp_path: Path, issue: str) -> None:
    model = fit(quiet_trainer(tmp_path, stack()), KeywordMLP())
    assert kinds(model) == STACK
    (x,) = MLP.inputs()
    for trained in (model.eval(), finalize(model)):
        assert "forward" not in vars(trained)  # not wrapped either
        plain = trained(x)
        if issue == "15862":
            torch.testing.assert_close(trained(x=x, scale=3.0), 3 * plain)
        else:
            torch.testing.assert_close(trained(x, 1.0, scale=3.0), 3 * plain + 1)


def test_7427_fit_twice_goes_on_training_the_same_compressed_model(tmp_path: Path) -> None:
    model = MLP()
    trainer = fitted(model, tmp_path)
    states = [tensors(model)]
    trainer.fit_loop.max_epochs = 2
    for again in (trainer, quiet_trainer(tmp_path, stack())):
        fit(again, model)
        assert kinds(model) == STACK
        states.append(tensors(model))
    for before, after in pairwise(states):
        assert not torch.equal(before["fc1.first.weight"], after["fc1.first.weight"])
        specs = [name for name in before if name.endswith("_extra_state")]
        assert_equal({name: after[name] for name in specs}, {name: before[name] for name in specs})


def test_6073_saving_keeps_the_model_in_training_form(tmp_path: Path) -> None:
    model = MLP()
    trainer = fitted(model, tmp_path)
    before = tensors(model)
    types = {name: type(module) for name, module in model.named_modules()}

    trainer.save_checkpoint(tmp_path / "manual.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)

    assert {name: type(module) for name, module in model.named_modules()} == types
    assert_equal(tensors(model), before)
    assert_equal(tensors(load_compressed(MLP, tmp_path / "manual.ckpt")), before)
    assert_equal(tensors(load_compressed(MLP, tmp_path / "weights.ckpt")), before)
