"""What a pipeline writes down so that an interrupted run can go on: what was asked, what is done, the model so far."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pquant_lightning.callbacks.base import CompressionCallback
from pquant_lightning.core.errors import CheckpointError, PQuantError
from pquant_lightning.core.serialization import atomic_file, read_checkpoint

STATE_NAME = "pipeline.json"
_VERSION = 1


class Journal:
    """The state of a run in a directory.

    Args:
        dirpath: made if it is not there.
        fingerprint: what must be the same for a run to go on, part by part.

    Attributes:
        finished: the results of the stages that are done, as plain data.
        share: what a budget has decided, as plain data; None before, or without one.

    Raises:
        CheckpointError: the directory holds another run, or its state is damaged.
    """

    def __init__(self, dirpath: Path, fingerprint: Mapping[str, Any]) -> None:
        self.dirpath = dirpath
        self.fingerprint = {k: hashlib.sha256(repr(v).encode()).hexdigest()[:16] for k, v in fingerprint.items()}
        self.finished: list[dict[str, Any]] = []
        self.share: list[dict[str, Any] | None] | None = None
        dirpath.mkdir(parents=True, exist_ok=True)
        path = dirpath / STATE_NAME
        if path.is_file():
            self._read(path)
        else:
            self._write()

    def _read(self, path: Path) -> None:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            found, version = state["fingerprint"], state["version"]
            self.finished, self.share = list(state["finished"]), state["share"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error!r}); remove it to start afresh.") from error
        changed = [key for key, value in self.fingerprint.items() if found.get(key) != value]
        if version != _VERSION or changed:
            raise CheckpointError(
                f"{self.dirpath} holds a run of another pipeline; what differs: {', '.join(changed) or 'version'}. Run "
                "it as it was, or give another dirpath."
            )

    def _write(self) -> None:
        state = {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "share": self.share,
            "finished": self.finished,
        }
        with atomic_file(self.dirpath / STATE_NAME) as file:
            file.write(json.dumps(state, indent=2).encode())

    def note_share(self, share: list[dict[str, Any] | None]) -> None:
        """Writes down what a budget has decided."""
        self.share = share
        self._write()

    def save(
        self, place: int, model: nn.Module, callbacks: Sequence[CompressionCallback], finished: list[dict[str, Any]]
    ) -> None:
        """Writes the model in training form, and what the callbacks know, after a stage."""
        state = {
            "state_dict": model.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in callbacks},
            "exclude": {callback.state_key: callback.method.exclude for callback in callbacks},
        }
        with atomic_file(self.dirpath / f"stage-{place + 1}.ckpt") as file:
            torch.save(state, file)
        self.finished = finished
        self._write()
        (self.dirpath / f"stage-{place}.ckpt").unlink(missing_ok=True)

    def load(self, place: int, model: nn.Module, callbacks: Sequence[CompressionCallback]) -> list[CompressionCallback]:
        """Brings a model to what it was after a stage; returns those of the callbacks that have acted, as they were."""
        saved = read_checkpoint(self.dirpath / f"stage-{place + 1}.ckpt")
        acted = [callback for callback in callbacks if callback.state_key in saved["callbacks"]]
        for callback in acted:
            callback.method = replace(callback.method, exclude=saved["exclude"][callback.state_key])
            callback.load_state_dict(saved["callbacks"][callback.state_key])
        try:
            model.load_state_dict(saved["state_dict"])
        except PQuantError:
            raise
        except RuntimeError as error:
            raise CheckpointError(f"{self.dirpath} does not fit {type(model).__name__}: {error}") from error
        return acted
