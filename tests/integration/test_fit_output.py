"""What a person sees of a fit: one table with all its columns, and a line to load the artefact that stays."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar

from pquant_lightning import LoRACallback, LowRankCallback, PruningCallback, PTQCallback, QATCallback
from tests.models import MLP, fit, quiet_trainer

STACKS: dict[str, Any] = {
    "at the start": lambda: [LowRankCallback(rank=2), QATCallback(bits=4)],
    "at the end": lambda: [PTQCallback()],
    "by a schedule": lambda: [PruningCallback(sparsity=0.9, include=["*"], min_saving=0.0)],
    "both": lambda: [LoRACallback(r=2), PTQCallback()],
}


class WithExample(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 16)


def _one_then_zeros(empty: Any) -> Any:
    def patched(*size: Any, **options: Any) -> torch.Tensor:
        memory = empty(*size, **options)
        if memory.numel() and not memory.is_meta:
            memory.zero_().flatten()[0] = 1
        return memory

    return patched


def tables(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if "whole model" in record.getMessage()]


@pytest.mark.parametrize("model", [MLP, WithExample])
@pytest.mark.parametrize("stack", STACKS)
def test_one_table_a_fit(stack: str, model: type[MLP], tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    callbacks = STACKS[stack]()

    fit(quiet_trainer(tmp_path, callbacks, max_epochs=3), model())

    (table,) = tables(package_log)
    assert callbacks[-1].report.macs is not None  # from the module's example, or from the first batch
    assert callbacks[-1].report.macs[0] == 16 * 32 + 32 * 24 + 24 * 4
    assert (f"{16 * 32 + 32 * 24 + 24 * 4:,}" in table) != ("give the module an example_input_array" in table)


@pytest.mark.parametrize("stack", STACKS)
def test_the_table_of_a_resume_is_of_the_values_in_the_file(
    stack: str, tmp_path: Path, package_log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that nothing has been written into is all zeros here, which a report takes for left out."""
    trainer = quiet_trainer(tmp_path, STACKS[stack]())
    fit(trainer, WithExample())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    package_log.clear()
    monkeypatch.setattr(torch, "empty", _one_then_zeros(torch.empty))

    callbacks = STACKS[stack]()
    fit(quiet_trainer(tmp_path, callbacks, max_epochs=2), WithExample(), ckpt_path=tmp_path / "last.ckpt")

    (table,) = tables(package_log)
    assert "→ -" not in table
    assert ("zeros" in table) == (stack == "by a schedule")


def test_the_bar_is_gone_when_the_line_to_load_is_printed(tmp_path: Path) -> None:
    bar, states = RichProgressBar(), []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "load_compressed(" in record.getMessage():
                states.append(bar.progress.live.is_started)

    handler = Watch()
    logging.getLogger("pquant_lightning").addHandler(handler)
    try:
        trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=2), bar], enable_progress_bar=True)
        fit(trainer, MLP())
    finally:
        logging.getLogger("pquant_lightning").removeHandler(handler)

    assert states == [False]
    assert not any(name.startswith("pquant/") for name in trainer.progress_bar_metrics)
