"""Fine-tuning of a stage: a plain Trainer, another learning rate, another batch size, checkpoints to go on from."""

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, RandomSampler

from pquant_lightning.callbacks._lightning import fitting, is_a
from pquant_lightning.core._private import resume_path
from pquant_lightning.core.errors import OptionError
from pquant_lightning.core.modes import to_training

log = logging.getLogger(__name__)

LAST = "last.ckpt"
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class SetLearningRate(Callback):
    """Scales all learning rates of the optimizers and schedulers, so that the first group starts at `lr`."""

    def __init__(self, lr: float) -> None:
        self.lr = lr

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if resume_path(trainer) is not None:  # the checkpoint has them scaled
            return
        for optimizer in trainer.optimizers:
            first = optimizer.param_groups[0]
            factor = self.lr / float(first.get("initial_lr", first["lr"]))
            for group in optimizer.param_groups:
                group.update({key: group[key] * factor for key in _RATES if key in group})
            for config in trainer.lr_scheduler_configs:
                scheduler: Any = config.scheduler
                if getattr(scheduler, "optimizer", None) is optimizer and hasattr(scheduler, "base_lrs"):
                    scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]


def with_batch_size(data: Any, size: int | None) -> Any:
    """The same data in batches of another size.

    Raises:
        OptionError: the data do not say how.
    """
    if data is None or size is None:
        return data
    if is_a(data, LightningDataModule) and hasattr(data, "batch_size"):
        changed: Any = copy.copy(data)
        changed.batch_size = size
        return changed
    if isinstance(data, DataLoader) and data.batch_size is not None:
        return DataLoader(
            data.dataset,
            size,
            shuffle=isinstance(data.sampler, RandomSampler),
            num_workers=data.num_workers,
            collate_fn=data.collate_fn,
            pin_memory=data.pin_memory,
            drop_last=data.drop_last,
            generator=data.generator,
        )
    raise OptionError(
        f"batch_size={size} goes with a DataLoader or a datamodule that has the attribute batch_size; a "
        f"{type(data).__name__} has its batches made. Leave batch_size out."
    )


def fine_tune(
    module: LightningModule,
    callbacks: Sequence[Callback],
    train: Any,
    val: Any,
    epochs: int,
    options: Mapping[str, Any],
    dirpath: Path | None,
) -> None:
    """Fits a module in place; with a `dirpath`, goes on from the checkpoint that an interrupted fit has left there."""
    to_training(module, always=True)
    own = [*callbacks]
    if dirpath is not None:
        checkpoint = fitting(ModelCheckpoint, module)
        own.append(checkpoint(dirpath, filename="epoch", save_last=True, enable_version_counter=False))
    extra = options.get("callbacks") or []
    given = {"max_epochs": epochs, "logger": False, "enable_model_summary": False, **options}
    given["callbacks"] = [*own, *(extra if isinstance(extra, list) else [extra])]
    if dirpath is None:
        given.setdefault("enable_checkpointing", False)
    trainer = fitting(Trainer, module)(**given)
    started = None if dirpath is None else dirpath / LAST
    data = {"datamodule": train} if is_a(train, LightningDataModule) else {"train_dataloaders": train}
    if val is not None and "datamodule" not in data:
        data["val_dataloaders"] = val.val_dataloader() if is_a(val, LightningDataModule) else val
    path = str(started) if started is not None and started.is_file() else None
    if path is not None:
        log.info("The fine-tuning goes on from %s", path)
    trainer.fit(module, **data, ckpt_path=path)
    module.trainer = None
