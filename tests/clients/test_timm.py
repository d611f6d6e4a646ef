"""timm: a small vision transformer, whose layers are of its own types, made by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import CompressedModule, LowRankCallback, QATCallback
from tests.clients.harness import Client, check

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.clients


class Pictures(CompressedModule, LightningModule):
    """Which colour of a noisy image is bright."""

    def __init__(self, name: str = "vit_tiny_patch16_224", width: int = 64) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = timm.create_model(
            name, pretrained=False, img_size=32, patch_size=8, embed_dim=width, depth=2, num_heads=4, num_classes=3
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores `(images, 3)`."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def images(seed: int, count: int) -> DataLoader:
    x = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(count) % 3
    x[torch.arange(count), labels] += 0.5
    return DataLoader(TensorDataset(x, labels), batch_size=32)


def predict(model: Any) -> Tensor:
    return torch.cat([model(x) for x, _ in images(1, 128)])


@torch.no_grad()
def loss(model: Any) -> float:
    return float(F.cross_entropy(predict(model), torch.arange(128) % 3))


def test_a_vision_transformer(tmp_path: Path) -> None:
    check(
        Client(
            package="timm",
            make=Pictures,
            loader=lambda: images(0, 512),
            stack=lambda: [LowRankCallback(param_ratio=0.6), QATCallback(bits=8)],
            predict=predict,
            error=loss,
            load=lambda path: Pictures.load_from_checkpoint(path),
            metric="cross-entropy",
        ),
        tmp_path,
    )
