"""One fit per case, shared by the tests of its checkpoints; both packages of Lightning; a counter of decisions."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from pquant_lightning import CompressionMethodRegistry
from pquant_lightning.methods.low_rank import _truncated_svd
from tests import models
from tests.contract.table import CASES, OTHER_PACKAGE, Case, assert_compressed, registered_methods
from tests.models import MODELS, SmallModule, fit, quiet_trainer

EPOCHS = 3


@dataclass(frozen=True)
class Fitted:
    """A finished fit of `EPOCHS` epochs; tests must not change the model."""

    case: Case
    model: SmallModule
    trainer: Trainer
    callbacks: list[Any]
    directory: Path

    def checkpoint(self, epoch: int) -> Path:
        """Written at the end of that epoch."""
        return self.directory / f"epoch={epoch}.ckpt"

    @property
    def best(self) -> Path:
        """The best of the epochs by validation loss."""
        return Path(self.trainer.checkpoint_callback.best_model_path)

    @property
    def artifact(self) -> Path:
        return self.callbacks[-1].artifact


def checkpointer(directory: Path) -> Any:
    """Keeps a checkpoint of every epoch, the best by validation loss."""
    make = importlib.import_module(f"{models.PACKAGE}.callbacks").ModelCheckpoint
    return make(directory, filename="{epoch}", monitor="val_loss", save_top_k=-1)


def resume(fitted: Fitted, directory: Path, path: Path) -> SmallModule:
    """Goes on from a checkpoint in a new Trainer, with new callbacks and a fresh model of another seed."""
    callbacks = fitted.case.make_callbacks()
    trainer = quiet_trainer(directory, [*callbacks, checkpointer(directory)], max_epochs=EPOCHS)
    return fit(trainer, fresh_model(fitted.case, seed=1), ckpt_path=path)


def fresh_model(case: Case, seed: int = 0) -> SmallModule:
    """As a user makes it: what `configure_model` builds is not there yet."""
    torch.manual_seed(seed)
    return MODELS[case.model]()


def use_package(patch: pytest.MonkeyPatch, package: str) -> None:
    """Models and Trainers are those of one of the two packages of Lightning, from here on."""
    patch.setattr(models, "PACKAGE", package)
    for name, model_class in models.models_of(package).MODELS.items():
        patch.setitem(MODELS, name, model_class)


@pytest.fixture(autouse=True)
def _package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of a fitted case goes on with the package of that case."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if "fitted" in params:
        use_package(monkeypatch, params["fitted"].package)


@pytest.fixture(scope="module", params=[*CASES, *OTHER_PACKAGE], ids=str)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Every case, fitted once per test file."""
    with pytest.MonkeyPatch.context() as patch:
        use_package(patch, request.param.package)
        return _fit(request.param, tmp_path_factory.mktemp("fit"))


def _fit(case: Case, directory: Path) -> Fitted:
    callbacks = case.make_callbacks()
    trainer = quiet_trainer(directory, [*callbacks, checkpointer(directory)], max_epochs=EPOCHS)
    model = fit(trainer, fresh_model(case))
    assert_compressed(model, callbacks)
    trainer.save_checkpoint(directory / f"epoch={EPOCHS - 1}.ckpt")  # again, with what was measured at the end
    return Fitted(case, model, trainer, callbacks, directory)


@dataclass
class Decisions:
    """How often a method has planned, and how often a matrix has been decomposed."""

    plans: int = 0
    decompositions: int = 0


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Decisions:
    """Counts from here on."""
    counted = Decisions()

    def count(owner: Any, name: str, field: str) -> None:
        original = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            setattr(counted, field, getattr(counted, field) + 1)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    for name in ("truncated_svd", "truncated_svd_by_energy", "singular_values"):
        count(_truncated_svd, name, "decompositions")
    for method in map(CompressionMethodRegistry.get_class, registered_methods()):
        count(method, "plan", "plans")
    return counted
