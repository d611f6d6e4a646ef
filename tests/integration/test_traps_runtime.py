"""Traps of how Lightning runs a model: precision, inference mode, sanity check, dry runs, compiled submodules."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import QATCallback, finalize, load_compressed, save_compressed
from tests.integration._helpers import QAT, STACK, AtStart, assert_all_trained, assert_equal, kinds, stack, tensors
from tests.models import MLP, fit, quiet_trainer


class SGDMLP(MLP):
    """Trained by plain gradient descent: Adam's epsilon is zero in float16, with or without compression."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def ranges(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("act_range")}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_ranges_stay_float32_in_every_precision(tmp_path: Path, precision: Any) -> None:
    model = fit(quiet_trainer(tmp_path, stack(), precision=precision), SGDMLP())
    assert kinds(model) == STACK
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}.get(
        precision, torch.float32
    )
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert len(ranges(model)) == 5
    for act_range in ranges(model).values():
        assert act_range.dtype == torch.float32
        assert act_range.isfinite().all()
    final = finalize(model)
    assert final.head.scale.dtype == torch.float32
    x = MLP.inputs()[0].to(dtype)
    assert final(x).dtype == dtype
    torch.testing.assert_close(final(x), model.eval()(x), rtol=0.05, atol=4e-3)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_the_artefact_and_the_checkpoint_keep_the_precision(tmp_path: Path, precision: Any) -> None:
    trainer = quiet_trainer(tmp_path, stack(), precision=precision)
    model = fit(trainer, SGDMLP())
    assert kinds(model) == STACK
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert_equal(tensors(load_compressed(SGDMLP(), tmp_path / "half.ckpt")), tensors(model))
    final = finalize(model)
    save_compressed(model, tmp_path / "half.safetensors")
    assert_equal(tensors(load_compressed(SGDMLP, tmp_path / "half.safetensors")), tensors(final))


def test_the_training_form_holds_no_integer_or_bool_buffers(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, stack()), MLP())
    assert kinds(model) == STACK
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_a_run_in_inference_mode_between_two_fits_does_not_break_backward(tmp_path: Path, run: str) -> None:
    model = MLP()
    for _ in range(2):
        fit(quiet_trainer(tmp_path, stack()), model)
        assert kinds(model) == STACK
        getattr(quiet_trainer(tmp_path, stack()), run)(model, MLP.loader())
        assert not any(tensor.is_inference() for tensor in (*model.buffers(), *model.parameters()))


def test_a_checkpoint_loaded_in_inference_mode_can_be_fitted(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, stack())
    fit(trainer, MLP())
    trainer.save_checkpoint(tmp_path / "stack.ckpt")

    model = MLP()
    quiet_trainer(tmp_path, stack()).test(model, MLP.loader(), ckpt_path=tmp_path / "stack.ckpt", verbose=False)
    assert kinds(model) == STACK
    loaded = model.fc1.first.weight.clone()
    fit(quiet_trainer(tmp_path, stack()), model)
    assert not torch.equal(model.fc1.first.weight, loaded)


class RangesBeforeTraining(Callback):
    """Keeps the ranges that the training starts from, after the sanity check."""

    found: dict[str, torch.Tensor]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert not trainer.sanity_checking
        self.found = {name: act_range.clone() for name, act_range in ranges(pl_module).items()}


def test_neither_sanity_check_nor_validation_feeds_the_observers(tmp_path: Path) -> None:
    (x,), target = MLP.inputs(32), torch.zeros(32, dtype=torch.long)
    huge = DataLoader(TensorDataset(1e6 * x, target), batch_size=8)
    seen, model = RangesBeforeTraining(), MLP()
    trainer = quiet_trainer(tmp_path, [QATCallback(num_samples=0), seen], max_epochs=2, num_sanity_val_steps=2)
    trainer.fit(model, MLP.loader(), huge)
    assert kinds(model) == QAT
    assert "val_loss" in trainer.callback_metrics
    assert len(seen.found) == 3
    assert all(act_range.tolist() == [torch.inf, -torch.inf] for act_range in seen.found.values())
    batches = torch.cat([batch[0] for batch in MLP.loader()])
    assert batches.min() <= model.fc1.act_range[0]
    assert model.fc1.act_range[1] <= batches.max()


def test_fast_dev_run_compresses_and_writes_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, stack(), fast_dev_run=True)
    model = fit(trainer, MLP())
    assert kinds(model) == STACK
    assert trainer.global_step == 1
    assert list(tmp_path.iterdir()) == []


class CompiledMLP(MLP):
    """Its middle is a compiled Sequential; names are as without the wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.fc2 = torch.compile(nn.Sequential(self.fc2, nn.ReLU(), nn.Linear(24, 24)), backend="eager")


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_submodule_is_compressed_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    start = AtStart()
    trainer = quiet_trainer(tmp_path, [*stack(), start])
    model = fit(trainer, CompiledMLP())
    inside = {name: kind for name, kind in kinds(model).items() if name.startswith("fc2.")}
    assert inside["fc2.0"] == inside["fc2.2"] == "low_rank_linear"
    assert inside["fc2.0.first"] == "quant_linear"
    assert_all_trained(model, start)

    trainer.save_checkpoint(tmp_path / "compiled.ckpt")
    loaded = load_compressed(CompiledMLP, tmp_path / "compiled.ckpt")
    (x,) = MLP.inputs()
    assert torch.equal(loaded(x), model.eval()(x))
    torch.testing.assert_close(finalize(model)(x), model(x))


def test_gradients_are_accumulated_and_clipped_as_ever(tmp_path: Path) -> None:
    start = AtStart()
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "max_epochs": 2}
    trainer = quiet_trainer(tmp_path, [*stack(), start], **options)
    model = fit(trainer, MLP())
    assert kinds(model) == STACK
    assert trainer.global_step == 4
    assert_all_trained(model, start)
