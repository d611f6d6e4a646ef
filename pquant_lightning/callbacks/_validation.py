"""Validation of a copy of the model that is being fitted, by a Trainer of its own, so that the fit notices nothing."""

import logging
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from pquant_lightning.callbacks._lightning import OTHER, OURS, fitting, is_a
from pquant_lightning.core.copying import deep_copy
from pquant_lightning.core.errors import OptionError, known


def check_logged(monitor: str, metrics: Any) -> None:
    """Checks that a metric has been logged.

    Raises:
        OptionError: it has not; the message lists those that have.
    """
    if monitor not in metrics:
        logged = known(monitor, list(metrics)) if metrics else "Nothing is logged: give the fit validation data."
        raise OptionError(f"monitor={monitor!r} is not logged by the validation. {logged}")


def validated(trainer: Trainer, module: LightningModule, monitor: str) -> float:
    """The metric of a model over the running fit's validation data; the model is not attached to any Trainer.

    Raises:
        OptionError: the metric is not logged, or there are no validation data.
    """
    loaders = trainer.val_dataloaders
    if not loaders:
        check_logged(monitor, {})
    metrics = validation_metrics(
        module,
        loaders,
        accelerator=trainer.strategy.root_device.type,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        default_root_dir=trainer.default_root_dir,
    )
    check_logged(monitor, metrics)
    return metrics[monitor]


def dense_metrics(trainer: Trainer, module: LightningModule) -> dict[str, float]:
    """What the validation of a model logs before its fit; empty without validation data, or in several processes.

    Neither the model nor the random numbers of the fit notice.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    smoke_test: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
    if trainer.world_size > 1 or smoke_test:
        return {}
    with torch.random.fork_rng(devices=[]):
        loop.setup_data()
        if not trainer.val_dataloaders:
            return {}
        options = {"limit_val_batches": trainer.limit_val_batches, "precision": trainer.precision}
        place = {"accelerator": trainer.strategy.root_device.type, "default_root_dir": trainer.default_root_dir}
        return validation_metrics(detached(module), trainer.val_dataloaders, **options, **place)


def validation_metrics(module: Any, data: Any, **options: Any) -> dict[str, float]:
    """What a model's own validation logs, by a quiet Trainer of its own, which leaves no trace in the model.

    Args:
        module: a LightningModule that belongs to no Trainer.
        data: loaders or a datamodule.
        **options: of the Trainer.
    """
    logs = [logging.getLogger(name) for name in (OURS, OTHER)]
    levels = [own_log.level for own_log in logs]
    for own_log in logs:
        own_log.setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        runner = fitting(Trainer, module)(
            **{"accelerator": "cpu", "devices": 1, "enable_model_summary": False, **quiet, **options}
        )
        given = {"datamodule" if is_a(data, LightningDataModule) else "dataloaders": data}
        found = runner.validate(module, verbose=False, **given)
    finally:
        for own_log, level in zip(logs, levels, strict=True):
            own_log.setLevel(level)
    module.trainer = None
    return {name: float(value) for result in found for name, value in result.items()}


def detached(module: LightningModule) -> LightningModule:
    """A copy of the model that belongs to no Trainer and compresses nothing."""
    wrapped = module.__dict__.pop("configure_model", None)
    try:
        return deep_copy(module)
    finally:
        if wrapped is not None:
            module.__dict__["configure_model"] = wrapped
