"""Traps around checkpoints: which structure comes from which file, and what is never a silent plain training."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from pquant_lightning import CompressedModule, LowRankCallback, QATCallback, load_compressed, prepare
from pquant_lightning.core.errors import CheckpointError
from pquant_lightning.core.partial import HINT
from tests.integration._helpers import LOW_RANK, STACK, assert_equal, kinds, stack, tensors
from tests.models import MLP, fit, quiet_trainer


def trained(directory: Path, name: str, *callbacks: Callback) -> tuple[MLP, Path]:
    """A model after one epoch with these callbacks, and its checkpoint."""
    trainer = quiet_trainer(directory, callbacks)
    model, path = fit(trainer, MLP()), directory / f"{name}.ckpt"
    trainer.save_checkpoint(path)
    return model, path


def ranks(model: MLP) -> set[int]:
    return {layer.spec["rank"] for layer in (model.fc1, model.fc2)}


def test_each_run_of_a_trainer_follows_its_own_path_never_that_of_the_run_before(tmp_path: Path) -> None:
    _, rank4 = trained(tmp_path, "rank4", LowRankCallback(rank=4))
    _, rank6 = trained(tmp_path, "rank6", LowRankCallback(rank=6))

    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=8)], max_epochs=2)
    resumed, tested, fitted = MLP(), MLP(), MLP()
    fit(trainer, resumed, ckpt_path=rank4)
    trainer.test(tested, MLP.loader(), ckpt_path=rank6, verbose=False)
    fit(trainer, fitted)
    assert [ranks(model) for model in (resumed, tested, fitted)] == [{4}, {6}, {8}]


def test_an_uncompressed_checkpoint_does_not_load_into_a_compressed_model(tmp_path: Path) -> None:
    plain, path = trained(tmp_path, "plain")
    model, _ = trained(tmp_path, "compressed", *stack())
    before = tensors(model)

    for load in (
        lambda: model.load_state_dict(plain.state_dict()),
        lambda: load_compressed(model, path),
        lambda: quiet_trainer(tmp_path, stack()).test(model, MLP.loader(), ckpt_path=path),
    ):
        with pytest.raises(CheckpointError, match=r"uncompressed layer.*'fc1'.*Load it into the uncompressed model"):
            load()
        assert kinds(model) == STACK
        assert_equal(tensors(model), before)


def test_fit_from_an_uncompressed_checkpoint_is_an_error_whose_remedy_works(tmp_path: Path) -> None:
    plain, path = trained(tmp_path, "plain")
    remedy = r"plain\.ckpt.*without LowRankCallback.*fit without ckpt_path.*load_compressed\(MLP, "
    with pytest.raises(CheckpointError, match=remedy):
        fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), MLP(), ckpt_path=path)

    model = load_compressed(MLP, path)
    assert_equal(tensors(model), tensors(plain))
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)]), model)
    assert kinds(model) == LOW_RANK


def test_resuming_with_one_more_callback_is_an_error_whose_remedy_works(tmp_path: Path) -> None:
    low_rank, path = trained(tmp_path, "low_rank", LowRankCallback(rank=4))
    callbacks = [LowRankCallback(rank=8), QATCallback()]
    with pytest.raises(CheckpointError, match=r"without QATCallback\(qat\).*load_compressed"):
        fit(quiet_trainer(tmp_path, callbacks), MLP(), ckpt_path=path)

    model = load_compressed(MLP, path)
    assert_equal(tensors(model), tensors(low_rank))
    fit(quiet_trainer(tmp_path, callbacks), model)
    assert kinds(model) == STACK
    assert ranks(model) == {4}  # the factors of the file, not decomposed again


def test_resuming_with_one_callback_less_keeps_the_structure_of_the_file(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "stack", *stack())
    model = fit(quiet_trainer(tmp_path, [LowRankCallback(rank=4)], max_epochs=2), MLP(), ckpt_path=path)
    assert kinds(model) == STACK


def test_every_checkpoint_is_weights_only_safe(tmp_path: Path) -> None:
    full = ModelCheckpoint(dirpath=tmp_path / "full", monitor="val_loss", save_last=True)
    weights = ModelCheckpoint(
        dirpath=tmp_path / "weights", every_n_train_steps=2, save_weights_only=True, save_top_k=-1
    )
    model = fit(quiet_trainer(tmp_path, [*stack(), full, weights], max_epochs=2), MLP())
    assert kinds(model) == STACK
    files = sorted(tmp_path.glob("*/*.ckpt"))
    assert len(files) == 6
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        assert checkpoint["state_dict"].keys() - {HINT} == model.state_dict().keys()
        assert kinds(load_compressed(MLP, file)) == STACK


@pytest.mark.parametrize("first", ["validate", "test", "predict"])
def test_a_run_before_the_fit_neither_compresses_nor_keeps_the_fit_from_it(tmp_path: Path, first: str) -> None:
    model = MLP()
    trainer = quiet_trainer(tmp_path, stack())
    getattr(trainer, first)(model, MLP.loader())
    assert kinds(model) == {}
    fit(trainer, model)
    assert kinds(model) == STACK


def test_a_checkpoint_tested_on_a_fresh_model_can_be_fitted_on(tmp_path: Path) -> None:
    _, path = trained(tmp_path, "stack", *stack())
    model = MLP()
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=8), QATCallback(bits=4)])
    trainer.test(model, MLP.loader(), ckpt_path=path, verbose=False)
    loaded = tensors(model)
    fit(trainer, model)
    assert kinds(model) == STACK
    assert ranks(model) == {4}
    assert model.head.spec["bits"] == 8
    assert not torch.equal(model.fc1.first.weight, loaded["fc1.first.weight"])


class MixedIn(CompressedModule, MLP):
    """Loads compressed checkpoints by plain Lightning."""


def test_plain_load_from_checkpoint_needs_the_mixin_or_prepare(tmp_path: Path) -> None:
    model, path = trained(tmp_path, "stack", *stack())
    with pytest.raises(RuntimeError, match=r"fc1\.first\.weight") as raised:  # Lightning's own message
        MLP.load_from_checkpoint(path)
    assert "load it with pquant_lightning.load_compressed(Class, path)" in str(raised.value)
    assert_equal(tensors(load_compressed(MLP, path)), tensors(model))
    assert_equal(tensors(MixedIn.load_from_checkpoint(path)), tensors(model))

    prepared = prepare(MLP())
    prepared.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert_equal(tensors(prepared), tensors(model))
