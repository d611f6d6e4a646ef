"""The driver with a method it has never heard of: schedule, state, exact zeros, monitors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pquant_lightning import CompressionCallback, LowRankCallback, QATCallback, finalize, load_compressed
from tests.contract import toys
from tests.contract.table import same_state, specs_of
from tests.contract.toys import ToyMethod, toy_layers
from tests.models import BATCHES, MLP, built, fit, quiet_trainer


@pytest.fixture(autouse=True, scope="module")
def _toy() -> Iterator[None]:
    with toys.registered():
        yield


def toy(**options: Any) -> Any:
    return CompressionCallback(ToyMethod(**options))


def is_zeroed(model: Any) -> bool:
    return all(not layer.weight[:, 0].any() for layer in toy_layers(model))


class RisingScore(MLP):
    """Its `score` gets worse with every epoch, so that a monitor prefers the first it sees."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("score", float(self.current_epoch))


class AfterEachBatch(Callback):
    """Notes whether the toy's columns are zero after each batch."""

    def __init__(self) -> None:
        self.zeroed: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.zeroed.append(is_zeroed(pl_module))


def test_step_is_called_before_every_batch_with_progress_from_0_to_1(tmp_path: Path) -> None:
    callback = toy()

    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=4), MLP())

    progress = callback.state_dict()["state"]["progress"]
    assert len(toy_layers(model)) == 3
    assert progress == pytest.approx([batch / (4 * BATCHES - 1) for batch in range(4 * BATCHES)])


def test_progress_counts_steps_where_they_end_the_training(tmp_path: Path) -> None:
    callback = toy()

    fit(quiet_trainer(tmp_path, [callback], max_epochs=-1, max_steps=5), MLP())

    assert callback.state_dict()["state"]["progress"] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_weights_are_exactly_zero_after_every_step_from_the_target_on(tmp_path: Path) -> None:
    after = AfterEachBatch()

    model = fit(quiet_trainer(tmp_path, [toy(end=0.5), after], max_epochs=4), MLP())

    assert after.zeroed == [False] * 2 * BATCHES + [True] * 2 * BATCHES
    assert is_zeroed(model)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_project_is_called_once_per_optimizer_step(tmp_path: Path, accumulate: int) -> None:
    callback = toy()
    trainer = quiet_trainer(tmp_path, [callback], max_epochs=2, accumulate_grad_batches=accumulate)

    fit(trainer, MLP())

    at_start = 1
    assert trainer.global_step == 2 * -(-BATCHES // accumulate)
    assert callback.state_dict()["state"]["projections"] == at_start + trainer.global_step


def test_no_hook_stays_on_the_optimizer(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [toy()])

    fit(trainer, MLP())

    assert not trainer.optimizers[0]._optimizer_step_post_hooks


def test_state_is_checkpointed_and_restored(tmp_path: Path) -> None:
    whole, first, second = toy(), toy(), toy()
    model = fit(quiet_trainer(tmp_path / "whole", [whole], max_epochs=4), built(MLP))
    # the same four epochs, broken off in the third
    trainer = quiet_trainer(tmp_path / "first", [first, StopAfter(epoch=2)], max_epochs=4)
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "broken.ckpt")
    assert first.state_dict()["complete"]

    resumed = MLP()
    trainer = quiet_trainer(tmp_path / "second", [second], max_epochs=4)
    fit(trainer, resumed, ckpt_path=tmp_path / "broken.ckpt")

    assert torch.load(tmp_path / "broken.ckpt", weights_only=True)["callbacks"][first.state_key]["state"]["progress"]
    assert second.state_dict()["state"]["progress"] == whole.state_dict()["state"]["progress"]
    assert second.state_dict()["complete"]
    assert specs_of(resumed) == specs_of(model)
    assert same_state(resumed, model)


class StopAfter(Callback):
    """Ends the training after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch >= self.epoch


def monitors(directory: Path) -> tuple[ModelCheckpoint, EarlyStopping]:
    return (
        ModelCheckpoint(directory, filename="{epoch}", monitor="score"),
        EarlyStopping("score", patience=4),
    )


def test_monitors_start_afresh_when_the_target_is_reached(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    checkpoint, stopping = monitors(tmp_path)
    trainer = quiet_trainer(tmp_path, [toy(end=0.5), checkpoint, stopping], max_epochs=6)

    fit(trainer, RisingScore())

    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt"
    assert is_zeroed(load_compressed(RisingScore, checkpoint.best_model_path))
    assert trainer.current_epoch == 6  # the old score would have stopped it after epoch 4
    assert "start afresh" in package_log.text


def test_monitors_keep_their_scores_on_request(tmp_path: Path) -> None:
    checkpoint, stopping = monitors(tmp_path)
    callback = CompressionCallback(ToyMethod(end=0.5), reset_monitors=False)
    trainer = quiet_trainer(tmp_path, [callback, checkpoint, stopping], max_epochs=6)

    fit(trainer, RisingScore())

    assert Path(checkpoint.best_model_path).name == "epoch=0.ckpt"
    assert trainer.current_epoch == 5


def test_a_resume_after_the_target_keeps_the_scores(tmp_path: Path) -> None:
    checkpoint, _ = monitors(tmp_path)
    first = quiet_trainer(tmp_path, [toy(end=0.5), checkpoint, StopAfter(epoch=4)], max_epochs=6)
    fit(first, RisingScore())
    first.save_checkpoint(tmp_path / "last.ckpt")

    checkpoint, _ = monitors(tmp_path)
    trainer = quiet_trainer(tmp_path, [toy(end=0.5), checkpoint], max_epochs=6)
    fit(trainer, RisingScore(), ckpt_path=tmp_path / "last.ckpt")

    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt"


def test_monitors_that_have_seen_the_uncompressed_model_start_afresh(tmp_path: Path) -> None:
    """One ModelCheckpoint for a plain fit and the compressed one after it."""
    checkpoint, _ = monitors(tmp_path)
    model = RisingScore()
    fit(quiet_trainer(tmp_path, [checkpoint]), model)
    plain = checkpoint.best_model_path

    fit(quiet_trainer(tmp_path, [QATCallback(bits=4), checkpoint], max_epochs=2), model)

    assert checkpoint.best_model_path != plain
    assert specs_of(load_compressed(RisingScore, checkpoint.best_model_path)) == specs_of(model)


def test_a_checkpoint_callback_of_an_equally_long_plain_fit_saves_the_compressed_model(tmp_path: Path) -> None:
    checkpoint, _ = monitors(tmp_path)
    model = RisingScore()
    fit(quiet_trainer(tmp_path, [checkpoint]), model)

    fit(quiet_trainer(tmp_path, [QATCallback(bits=4), checkpoint]), model)

    assert Path(checkpoint.best_model_path).is_file()
    assert specs_of(load_compressed(RisingScore, checkpoint.best_model_path)) == specs_of(model)


def test_open_ended_training_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"open-ended.*max_steps"):
        fit(quiet_trainer(tmp_path, [toy()], max_epochs=-1), MLP())


def test_open_ended_training_is_no_matter_without_a_schedule(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=2), StopAfter(epoch=0)], max_epochs=-1)

    model = fit(trainer, MLP())

    assert specs_of(model)


def test_a_fit_that_ends_before_the_target_warns(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    fit(quiet_trainer(tmp_path, [toy(end=0.9), StopAfter(epoch=1)], max_epochs=4), MLP())

    (warning,) = [record for record in package_log.records if record.levelname == "WARNING"]
    assert "90 %" in warning.getMessage()
    assert "CompressionCallback(toy)" in warning.getMessage()


def test_a_fast_dev_run_does_not_warn(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    model = fit(quiet_trainer(tmp_path, [toy()], fast_dev_run=1), MLP())

    assert toy_layers(model)
    assert not [record for record in package_log.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_a_fit_that_reaches_its_target_does_not_warn(
    end: float, tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    model = fit(quiet_trainer(tmp_path, [toy(end=end)], max_epochs=4), MLP())

    assert not [record for record in package_log.records if record.levelname == "WARNING"]
    assert is_zeroed(model)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_it_stands_between_low_rank_and_qat(position: int, tmp_path: Path) -> None:
    """In its place it works; anywhere else is an error that shows the right order."""
    callbacks = [LowRankCallback(rank=2, include=["fc1"]), QATCallback(bits=8, include=["fc2"])]
    callbacks.insert(position, toy(include=["head"]))
    right = "LowRankCallback(low_rank), CompressionCallback(toy), QATCallback(qat)"
    trainer, model = quiet_trainer(tmp_path, callbacks, max_epochs=2), MLP()

    if position != 1:
        with pytest.raises(ValueError, match="order") as caught:
            fit(trainer, model)
        assert right in str(caught.value)
        assert not specs_of(model)
        return
    fit(trainer, model)

    assert len(toy_layers(model)) == 1
    assert is_zeroed(model)


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    callback = toy()
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=2), MLP())

    loaded = load_compressed(MLP, callback.artifact)

    assert is_zeroed(loaded)
    assert same_state(loaded, finalize(model))
