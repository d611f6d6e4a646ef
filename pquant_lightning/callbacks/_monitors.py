"""Monitors that start afresh when the model has become another: its old best score is not comparable."""

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from pquant_lightning.callbacks._lightning import is_a
from pquant_lightning.core._private import LAST_STEP_SAVED


def _monitors(trainer: Trainer) -> list[Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if (is_a(c, ModelCheckpoint) or is_a(c, EarlyStopping)) and c.monitor is not None]


def reset_would_matter(trainer: Trainer) -> bool:
    """Whether any monitor remembers a score."""
    return any(
        bool(m.best_k_models) if is_a(m, ModelCheckpoint) else math.isfinite(float(m.best_score))
        for m in _monitors(trainer)
    )


def reset_monitors(trainer: Trainer) -> None:
    """ModelCheckpoint forgets its best models (the files stay), EarlyStopping its best score and its patience."""
    for monitor in _monitors(trainer):
        worst = torch.tensor(math.inf if monitor.mode == "min" else -math.inf)
        if is_a(monitor, ModelCheckpoint):
            monitor.best_k_models, monitor.best_model_path, monitor.best_model_score = {}, "", None
            monitor.kth_best_model_path, monitor.kth_value = "", worst
            setattr(monitor, LAST_STEP_SAVED, 0)  # else an equally long second fit would save nothing
        else:
            monitor.wait_count, monitor.best_score = 0, worst
