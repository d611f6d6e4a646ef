"""Checkpoints inside of a Trainer, read as the Trainer reads them: by its CheckpointIO, with its switch."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from pquant_lightning.core.serialization import read_checkpoint

_PLAIN_IO = "fabric.plugins.io.torch_io"


def read_as_trainer(trainer: Trainer, path: str | Path, weights_only: bool | None) -> dict[str, Any]:
    """A checkpoint file on the CPU.

    Args:
        trainer: whose plugins may store checkpoints in another way than `torch.save`.
        path: of one file, as the Trainer knows it.
        weights_only: as in `Trainer.fit`; False reads objects, None leaves it to torch.

    Raises:
        CheckpointError: the file is missing or truncated, or holds objects that it must not hold.
    """
    io = trainer.strategy.checkpoint_io
    if type(io).__module__.endswith(_PLAIN_IO) and "://" not in str(path):
        return read_checkpoint(Path(path), weights_only)  # memory-mapped, and with clearer errors
    found: dict[str, Any] = io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)
    return found


def best_path(trainer: Trainer) -> str:
    """The checkpoint that is the best by a monitored metric so far; empty where none is."""
    checkpointer: Any = trainer.checkpoint_callback
    if getattr(checkpointer, "monitor", None) is None:
        return ""
    return str(getattr(checkpointer, "best_model_path", "") or "")
