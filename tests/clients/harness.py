"""What every real package must do with our callbacks: train, resume, load in two ways, and stay as good.

One command runs all of them and prints the table (`tests/clients/conftest.py`):

    pip install -c .ci/constraints.txt -e ".[test,clients]"
    OMP_NUM_THREADS=1 pytest -n 0 -m clients tests/clients

A package that is not installed is skipped; torch_geometric comes with the extra `test`, so the ordinary suite
runs it. timm and lightly need torchvision; built for the installed torch, or torchmetrics cannot be imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from pquant_lightning import finalize, load_compressed, save_compressed
from pquant_lightning.core.compressed_layer import compressed_layers


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    package: str
    model: str
    stack: str
    bytes_before: int
    bytes_after: int
    metric: str
    plain: float
    compressed: float


ROWS: list[Row] = []  # of this session, in the order of the tests


@dataclass(frozen=True)
class Client:
    """How a package is used.

    Attributes:
        package: its name.
        make: the untrained (or pretrained) model, always the same after the same seed.
        loader: batches to train on, always in the same order.
        stack: the callbacks, new ones at each call.
        predict: outputs of the model on data that it was not trained on.
        error: a number that is smaller for a better model, on that data.
        load: the package's own way from a checkpoint of the compressed training to a model.
        metric: what `error` is, in words.
        epochs: of every training.
        allowed: the error may be this many times that of the plain training.
        learns: the plain training must bring the error below this share of the first one, or there is nothing to lose.
        keeps: the file may keep this share of the plain file's bytes.
        weights_only: False where the package's checkpoints hold objects of its own.
    """

    package: str
    make: Callable[[], LightningModule]
    loader: Callable[[], Any]
    stack: Callable[[], list[Any]]
    predict: Callable[[Any], Tensor]
    error: Callable[[Any], float]
    load: Callable[[Path], Any]
    metric: str
    epochs: int = 4
    allowed: float = 1.25
    learns: float = 0.7
    keeps: float = 0.5
    weights_only: bool = True


def check(client: Client, folder: Path) -> None:
    """Trains plainly and with the stack, resumes, loads, compares; adds a row to the table."""
    plain = _made(client)
    untrained = client.error(plain.eval())
    plain.train()
    _fit(client, plain, folder / "plain", [])
    bytes_before = save_compressed(plain, folder / "plain.safetensors").stat().st_size
    model, stack = _made(client), client.stack()
    _fit(client, model, folder / "first", stack)
    expected = _predictions(client, model)
    assert compressed_layers(model) or any("Pruning" in type(callback).__name__ for callback in stack)

    resumed = _made(client)
    first = _checkpoint(folder / "first", 0)
    _fit(client, resumed, folder / "resumed", client.stack(), ckpt_path=first, weights_only=client.weights_only)
    torch.testing.assert_close(_predictions(client, resumed), expected)

    last = _checkpoint(folder / "first", client.epochs - 1)
    assert torch.equal(_predictions(client, client.load(last)), expected)
    loaded = load_compressed(_made(client), last, weights_only=client.weights_only)
    assert torch.equal(_predictions(client, loaded), expected)

    artifact = next(callback.artifact for callback in reversed(stack) if callback.artifact is not None)
    deployed = load_compressed(_made(client), artifact)
    deployed_output = _predictions(client, deployed)
    assert torch.equal(deployed_output, _predictions(client, finalize(model)))

    row = Row(
        client.package,
        type(model).__name__,
        " + ".join(type(callback).__name__.removesuffix("Callback") for callback in stack),
        bytes_before,
        artifact.stat().st_size,
        client.metric,
        client.error(plain.eval()),
        client.error(deployed),
    )
    ROWS.append(row)
    assert row.plain <= client.learns * untrained, f"{untrained:.4g} -> {row.plain:.4g}: it learned too little"
    assert row.bytes_after <= client.keeps * row.bytes_before, row
    assert row.compressed <= client.allowed * row.plain, row


def _made(client: Client) -> LightningModule:
    seed_everything(0, verbose=False)
    return client.make()


def _checkpoint(folder: Path, epoch: int) -> Path:
    return next((folder / "kept").glob(f"epoch={epoch}-*.ckpt"))


def _fit(client: Client, model: LightningModule, folder: Path, stack: Sequence[Callback], **options: Any) -> None:
    seed_everything(1, verbose=False)
    trainer = Trainer(
        max_epochs=client.epochs,
        callbacks=[*stack, ModelCheckpoint(folder / "kept", save_top_k=-1)],
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, client.loader(), **options)


@torch.no_grad()
def _predictions(client: Client, model: nn.Module) -> Tensor:
    return client.predict(model.eval())
