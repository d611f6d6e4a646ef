"""lightly: two views of an image brought together by its projection head and its loss (SimCLR)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import CompressedModule, PruningCallback, QATCallback
from tests.clients.harness import Client, check

pytest.importorskip("lightly")

from lightly.loss import NTXentLoss
from lightly.models.modules import SimCLRProjectionHead

pytestmark = pytest.mark.clients


class Views(CompressedModule, LightningModule):
    """A convolutional encoder and lightly's head."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = SimCLRProjectionHead(2 * width, 2 * width, 32)
        self.loss = NTXentLoss()

    def forward(self, x: Tensor) -> Tensor:
        """Projections `(images, 32)`."""
        return self.head(self.encoder(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        first, second = batch
        return self.loss(self(first), self(second))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def views(seed: int, count: int) -> DataLoader:
    """Two noisy copies `(count, 3, 16, 16)` of each image."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(count, 3, 4, 4, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    first, second = (image + 0.5 * torch.randn(image.shape, generator=generator) for _ in range(2))
    return DataLoader(TensorDataset(first, second), batch_size=64)


def predict(model: Any) -> Tensor:
    return torch.cat([model(view) for batch in views(1, 128) for view in batch])


@torch.no_grad()
def loss(model: Any) -> float:
    values = [NTXentLoss()(model(first), model(second)) for first, second in views(1, 256)]
    return float(torch.stack(values).mean())


def test_two_views_of_an_image(tmp_path: Path) -> None:
    check(
        Client(
            package="lightly",
            make=Views,
            loader=lambda: views(0, 512),
            stack=lambda: [PruningCallback(sparsity=0.6), QATCallback(bits=8)],
            predict=predict,
            error=loss,
            load=lambda path: Views.load_from_checkpoint(path),
            metric="contrastive loss",
        ),
        tmp_path,
    )
