"""Small LightningModules with small random data and a quiet Trainer, for every test that fits, saves or loads."""

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

PACKAGES = ("lightning" + ".pytorch", "pytorch" + "_lightning")
PACKAGE = "lightning.pytorch"  # whose Trainer the tests run; a fixture changes it

CLASSES = 4
BATCH_SIZE = 8
BATCHES = 4  # per epoch

Inputs = tuple[Tensor, ...]


class SmallModule(LightningModule):
    """A classifier whose batches are `(*inputs, target)`; subclasses give the layers, `forward` and `draw`."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        """Random inputs of `forward`, each of length `count`."""
        raise NotImplementedError

    @classmethod
    def inputs(cls, count: int = BATCH_SIZE, seed: int = 0) -> Inputs:
        """Inputs of `forward`, the same for the same seed."""
        return cls.draw(count, torch.Generator().manual_seed(seed))

    @classmethod
    def loader(cls, seed: int = 0) -> DataLoader[Inputs]:
        """`BATCHES` batches, always in the same order."""
        generator = torch.Generator().manual_seed(seed)
        inputs = cls.draw(BATCH_SIZE * BATCHES, generator)
        target = torch.randint(CLASSES, (BATCH_SIZE * BATCHES,), generator=generator)
        return DataLoader(TensorDataset(*inputs, target), BATCH_SIZE)

    def loss(self, batch: Inputs) -> Tensor:
        *inputs, target = batch
        return F.cross_entropy(self(*inputs), target)

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Inputs, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Inputs, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        *inputs, _ = batch
        return self(*inputs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)


class MLP(SmallModule):
    """16 -> 32 -> 24 -> 4."""

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__(lr)
        self.fc1 = nn.Linear(16, width)
        self.fc2 = nn.Linear(width, 24)
        self.head = nn.Linear(24, CLASSES)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(count, 16, generator=generator),)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


class ConvNet(SmallModule):
    """A plain and a grouped convolution, each with batch norm, and a linear head."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 16, 3, groups=2), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, CLASSES)

    @staticmethod
    def draw(count: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(count, 3, 8, 8, generator=generator),)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Transformer(SmallModule):
    """Stock `nn.TransformerEncoder` over tokens, with a key padding mask or without one."""

    VOCABULARY, LENGTH, WIDTH = 32, 6, 16

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.embed = nn.Embedding(self.VOCABULARY, self.WIDTH)
        layer = nn.TransformerEncoderLayer(self.WIDTH, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(self.WIDTH, CLASSES)

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> Inputs:
        """Tokens and a padding mask (True = padding) over the last one to five places of every other sequence."""
        tokens = torch.randint(cls.VOCABULARY, (count, cls.LENGTH), generator=generator)
        lengths = torch.randint(1, cls.LENGTH, (count, 1), generator=generator)
        lengths[::2] = cls.LENGTH
        return tokens, torch.arange(cls.LENGTH) >= lengths

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        hidden = self.encoder(self.embed(tokens), src_key_padding_mask=padding_mask)
        if padding_mask is not None:
            hidden = hidden.masked_fill(padding_mask.unsqueeze(-1), 0.0)
        return self.head(hidden.mean(1))


class TiedTransformer(Transformer):
    """Embedding and head are one `Parameter`; the scores are those of the first `CLASSES` tokens."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr)
        self.head = nn.Linear(self.WIDTH, self.VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens, padding_mask)[:, :CLASSES]


class LateMLP(SmallModule):
    """Its layers are built in `configure_model`."""

    draw = MLP.draw

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


MODELS: dict[str, type[SmallModule]] = {
    "mlp": MLP,
    "conv_net": ConvNet,
    "transformer": Transformer,
    "tied_transformer": TiedTransformer,
    "late_mlp": LateMLP,
}


def models_of(package: str) -> ModuleType:
    """This file, with all its classes derived from those of one of the two packages of Lightning."""
    if package == PACKAGES[0]:
        return sys.modules[__name__]
    name = f"{__name__}_of_{package}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        source = Path(__file__).read_text(encoding="utf-8").replace(PACKAGES[0], package)
        exec(compile(source, __file__, "exec"), module.__dict__)
    return sys.modules[name]


class SmallData(LightningDataModule):
    """The batches of one of the models, for the command line."""

    def __init__(self, model: str = "mlp") -> None:
        super().__init__()
        self.model = MODELS[model]

    def train_dataloader(self) -> DataLoader[Inputs]:
        return self.model.loader(seed=0)

    def val_dataloader(self) -> DataLoader[Inputs]:
        return self.model.loader(seed=1)

    def test_dataloader(self) -> DataLoader[Inputs]:
        return self.model.loader(seed=2)


def built(model_class: type[SmallModule], seed: int = 0) -> SmallModule:
    """A model with all its layers and reproducible weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class()
        model.configure_model()
    return model


def quiet_trainer(directory: Path, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A CPU Trainer that prints nothing and writes below `directory` only."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    place = {"accelerator": "cpu", "devices": 1, "default_root_dir": directory}
    make = importlib.import_module(PACKAGE).Trainer
    return make(**{**quiet, **place, "max_epochs": 1, **options}, callbacks=list(callbacks))


def fit(trainer: Trainer, model: SmallModule, **options: Any) -> SmallModule:
    """Fits on the model's own training and validation batches."""
    trainer.fit(model, model.loader(seed=0), model.loader(seed=1), **options)
    return model
