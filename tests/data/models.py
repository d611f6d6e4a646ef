"""The models of the stored files. Nothing here may change: the files know these names and sizes."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class Branches(nn.Module):
    """Two layers of each type after another, each pair on inputs of its own; the outputs side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(8, 8), nn.Linear(8, 4)
        self.conv1d1, self.conv1d2 = nn.Conv1d(4, 4, 3), nn.Conv1d(4, 4, 3, padding=1)
        self.conv2d1, self.conv2d2 = nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.conv3d1, self.conv3d2 = nn.Conv3d(2, 4, 2), nn.Conv3d(4, 2, 2)
        self.up1d1, self.up1d2 = nn.ConvTranspose1d(4, 4, 3), nn.ConvTranspose1d(4, 4, 3, stride=2)
        self.up2d1, self.up2d2 = nn.ConvTranspose2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.up3d1, self.up3d2 = nn.ConvTranspose3d(2, 4, 2), nn.ConvTranspose3d(4, 2, 2)
        self.embedding, self.reader = nn.Embedding(16, 8), nn.Linear(8, 4)

    @staticmethod
    def inputs(seed: int = 0, count: int = 4) -> tuple[Tensor, ...]:
        """One tensor for each pair of layers, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        shapes = [(8,), (4, 8), (4, 6, 6), (2, 4, 4, 4), (4, 5), (4, 4, 4), (2, 3, 3, 3)]
        tokens = torch.randint(16, (count, 5), generator=generator)
        return (*(torch.randn(count, *shape, generator=generator) for shape in shapes), tokens)

    def forward(
        self,
        flat: Tensor,
        line: Tensor,
        image: Tensor,
        block: Tensor,
        small_line: Tensor,
        small_image: Tensor,
        small_block: Tensor,
        tokens: Tensor,
    ) -> Tensor:
        outputs = [
            self.linear2(F.relu(self.linear1(flat))),
            self.conv1d2(F.relu(self.conv1d1(line))),
            self.conv2d2(F.relu(self.norm(self.conv2d1(image)))),
            self.conv3d2(F.relu(self.conv3d1(block))),
            self.up1d2(F.relu(self.up1d1(small_line))),
            self.up2d2(F.relu(self.up2d1(small_image))),
            self.up3d2(F.relu(self.up3d1(small_block))),
            self.reader(F.relu(self.embedding(tokens))),
        ]
        return torch.cat([output.flatten(1) for output in outputs], 1)


class Classifier(LightningModule):
    """What the two models of the fits have in common."""

    @staticmethod
    def inputs(seed: int = 0, count: int = 8) -> tuple[Tensor, ...]:
        """The inputs of `forward`, the same for the same seed."""
        raise NotImplementedError

    @classmethod
    def loader(cls) -> DataLoader[tuple[Tensor, ...]]:
        """Four batches of inputs and targets, in the same order every time."""
        (inputs,) = cls.inputs(1, 32)
        return DataLoader(TensorDataset(inputs, torch.arange(32) % 4), 8)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0])[:, :4], batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)


class Tokens(Classifier):
    """A transformer encoder over tokens; embedding and head share a weight."""

    def __init__(self, width: int = 16, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Embedding(24, width)
        layer = nn.TransformerEncoderLayer(width, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=1, enable_nested_tensor=False)
        self.head = nn.Linear(width, 24, bias=False)
        self.head.weight = self.embed.weight

    @staticmethod
    def inputs(seed: int = 0, count: int = 8) -> tuple[Tensor, ...]:
        return (torch.randint(24, (count, 6), generator=torch.Generator().manual_seed(seed)),)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Images(Classifier):
    """A convolutional net with batch norms."""

    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, 2 * width, 3, groups=2), nn.BatchNorm2d(2 * width)
        self.head = nn.Linear(2 * width, 4)

    @staticmethod
    def inputs(seed: int = 0, count: int = 8) -> tuple[Tensor, ...]:
        return (torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))).mean((2, 3)))


MODELS: dict[str, type[nn.Module]] = {"branches": Branches, "tokens": Tokens, "images": Images}
