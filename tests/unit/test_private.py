"""Each private name of torch and Lightning in `core/_private.py` still exists and still behaves."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from torch import nn

from pquant_lightning.core import _private
from tests.models import MLP, fit, quiet_trainer


def test_the_tables_of_a_module() -> None:
    module = nn.BatchNorm1d(2)
    for table in (*_private.MODULE_HOOKS, *_private.TENSOR_TABLES, _private.MODULE_TABLE):
        assert isinstance(module.__dict__[table], dict)
    assert _private.FULL_BACKWARD_FLAG in module.__dict__
    assert set(module.__dict__["_parameters"]) == {"weight", "bias"}
    assert set(module.__dict__["_buffers"]) == {"running_mean", "running_var", "num_batches_tracked"}


@pytest.mark.parametrize(
    ("register", "table"),
    [
        ("register_forward_hook", "_forward_hooks"),
        ("register_forward_pre_hook", "_forward_pre_hooks"),
        ("register_full_backward_hook", "_backward_hooks"),
        ("register_full_backward_pre_hook", "_backward_pre_hooks"),
    ],
)
def test_hooks_are_kept_in_these_tables(register: str, table: str) -> None:
    module = nn.Linear(2, 2)
    getattr(module, register)(lambda *_: None)
    assert len(module.__dict__[table]) == 1


def test_a_shallow_copy_has_no_load_hook_of_the_original() -> None:
    module = nn.Linear(2, 2)
    module.register_load_state_dict_pre_hook(lambda *_: pytest.fail("the original's hook was called"))
    twin = _private.shallow_copy(module)
    twin.load_state_dict(module.state_dict())
    assert twin.weight is module.weight


def test_run_has_the_resolved_path_as_a_local() -> None:
    run = Trainer._run
    assert "ckpt_path" in inspect.signature(run).parameters
    assert "_call_setup_hook" in inspect.getsource(run)


def test_the_path_is_known_in_setup_only_of_the_run_that_has_one(tmp_path: Any) -> None:
    seen = []

    class Spy(MLP):
        def setup(self, stage: str) -> None:
            seen.append(_private.resume_path(self.trainer))

    trainer = quiet_trainer(tmp_path)
    model = fit(trainer, Spy())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    fit(quiet_trainer(tmp_path, max_epochs=2), Spy(), ckpt_path=tmp_path / "one.ckpt")
    trainer.test(model, MLP.loader(), verbose=False)
    assert seen == [None, str(tmp_path / "one.ckpt"), None]
    assert _private.resume_path(trainer) is None


def test_launchers_of_copies_are_known_by_name() -> None:
    launcher = object.__new__(type("Launcher", (_MultiProcessingLauncher,), {"__abstractmethods__": frozenset()}))
    assert _private.launches_copies(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert not _private.launches_copies(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))
