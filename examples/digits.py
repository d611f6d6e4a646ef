"""Handwritten digits for `configs/digits_*.yaml`: a data module, two small networks, and a dense starting point.

Nothing in the networks knows about compression: they are ordinary LightningModules.

    pquant fit --config configs/digits_low_rank_qat.yaml

The data are scikit-learn's bundled 8x8 digits, so that nothing is downloaded (`pip install scikit-learn`).
"""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

log = logging.getLogger("pquant_lightning.examples.digits")

torch.set_num_threads(1)  # as fast as two at these sizes, and many times faster where another process keeps a core busy

for message in (
    ".*does not have many workers.*",  # all images are one 450 kB tensor in memory: workers would only slow us down
    "Total length of `list` across ranks is zero.*",  # `val_share=0` leaves validation out on purpose
    ".*LeafSpec.*",  # Lightning 2.6 on torch 2.13
):
    warnings.filterwarnings("ignore", message=message)

Batch = tuple[Tensor, ...]  # images (N, 1, 8, 8) in [0, 1], labels (N,) in 0..9


class DigitsDataModule(LightningDataModule):
    """scikit-learn's digits: 1,257 training and 540 test images, always the same split.

    Args:
        batch_size: Images per batch.
        val_share: Share of the training images, taken from their end, that is kept for validation.
            0 trains on all of them and leaves the validation out.
        seed: Seed of the order in which the training images are drawn (the split does not depend on it).
        quarter_turns: How often all images are turned by 90 degrees, for a model that is to be adapted later.
    """

    def __init__(self, batch_size: int = 64, val_share: float = 0.2, seed: int = 0, quarter_turns: int = 0) -> None:
        super().__init__()
        if not 0.0 <= val_share < 1.0:
            raise ValueError(f"val_share={val_share}: the share of training images to hold out must be in [0, 1).")
        self.save_hyperparameters()
        self.batch_size, self.val_share, self.seed = batch_size, val_share, seed
        self.quarter_turns = quarter_turns

    def setup(self, stage: str) -> None:
        """Load the images, in [0, 1], and split them."""
        digits = load_digits()
        images = torch.from_numpy(digits.images / 16).float().unsqueeze(1)  # (1797, 1, 8, 8)
        images = images.rot90(self.quarter_turns, (2, 3))
        labels = torch.from_numpy(digits.target).long()
        train, test = train_test_split(range(len(labels)), test_size=0.3, random_state=0, stratify=digits.target)
        num_train = len(train) - int(len(train) * self.val_share)
        self.train_set, self.val_set, self.test_set = (
            TensorDataset(images[indices], labels[indices]) for indices in (train[:num_train], train[num_train:], test)
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """Shuffled, in an order that depends on `seed` only."""
        generator = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.train_set, self.batch_size, shuffle=True, generator=generator)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Empty, so that Lightning skips validation, where nothing is held out."""
        return DataLoader(self.val_set, batch_size=256) if len(self.val_set) else []

    def test_dataloader(self) -> DataLoader[Batch]:
        """All 540 test images."""
        return DataLoader(self.test_set, batch_size=256)


class DigitsClassifier(LightningModule):
    """Training and evaluation steps of the two networks: AdamW, with a cosine from `lr` to zero over the whole fit.

    A subclass sets `features`, which maps images `(N, 1, 8, 8)` to `(N, F)`, and `head`, the last `Linear(F, 10)`.
    """

    features: nn.Module
    head: nn.Linear

    def __init__(self, lr: float, weight_decay: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes=10, average="micro")
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # lets Lightning and the compression report count MACs

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 1, 8, 8)`."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.hparams["lr"], weight_decay=self.hparams["weight_decay"]
        )
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}


class DigitsMLP(DigitsClassifier):
    """64-128-128-10 with ReLU: 26,122 parameters.

    Args:
        lr: Learning rate at the start of the cosine.
        weight_decay: AdamW's weight decay.
    """

    def __init__(self, lr: float = 2e-3, weight_decay: float = 1e-4) -> None:
        super().__init__(lr, weight_decay)
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        self.head = nn.Linear(128, 10)


class DigitsConvNet(DigitsClassifier):
    """Two 3x3 convolutions with batch norm, a max-pool and two linear layers: 38,378 parameters.

    Args:
        lr: Learning rate at the start of the cosine.
        weight_decay: AdamW's weight decay.
    """

    def __init__(self, lr: float = 2e-3, weight_decay: float = 1e-4) -> None:
        super().__init__(lr, weight_decay)
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding="same"),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding="same"),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 32, 4, 4)
            nn.Flatten(),
            nn.Linear(512, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of `batches` that `model` classifies correctly, in evaluation mode and on the model's own device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    metric = MulticlassAccuracy(num_classes=10, average="micro").to(device)
    was_training = model.training
    model.eval()
    for images, labels in batches:
        metric.update(model(images.to(device)), labels.to(device))
    model.train(was_training)
    return metric.compute().item()


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the messages with which Lightning starts and ends a fit."""
    lightning_log = logging.getLogger("lightning.pytorch")
    level = lightning_log.level
    lightning_log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        lightning_log.setLevel(level)


class StartFromDense(Callback):
    """Give a fit trained weights to compress, and log the accuracy before compression, right after it, and at the end.

    It stands first in the list of callbacks, so that one command shows the usual story, train, compress, fine-tune;
    with a model of your own you would load its trained weights instead. A resumed fit trains nothing here.

    Args:
        epochs: Epochs of the dense training.
        lr: Its learning rate, in place of the module's own, which is meant for the fine-tuning.
    """

    def __init__(self, epochs: int = 40, lr: float = 2e-3) -> None:
        self.epochs, self.lr = epochs, lr
        self.started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Train a copy on the fit's own data, then take its weights over: the outer trainer notices nothing."""
        from pquant_lightning.core._private import resume_path

        if stage != "fit" or self.started or resume_path(trainer) is not None:
            return
        self.started = True
        data: LightningDataModule = trainer.datamodule  # type: ignore[attr-defined]
        dense = copy.deepcopy(pl_module)
        dense.hparams["lr"] = self.lr
        log.info("Training the dense model for %d epochs, to have something to compress ...", self.epochs)
        with quiet():
            dense_trainer = Trainer(
                max_epochs=self.epochs,
                accelerator="cpu",
                limit_val_batches=0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            dense_trainer.fit(dense, data.train_dataloader(), data.val_dataloader())
        pl_module.load_state_dict(dense.state_dict())
        self._log_accuracy("dense", trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model has just been compressed (or loaded from a checkpoint); no step was made yet."""
        self._log_accuracy("compressed, not yet fine-tuned" if self.started else "resumed", trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step has been made."""
        self._log_accuracy("compressed and fine-tuned", trainer, pl_module)

    def _log_accuracy(self, what: str, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        log.info("Validation accuracy, %s: %.1f %%", what, 100 * accuracy(pl_module, batches))
