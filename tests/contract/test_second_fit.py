"""A second fit of a compressed model by a callback with other options: what cannot act is said."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pquant_lightning import (
    CPCallback,
    FactorizationCallback,
    LoRACallback,
    LowRankCallback,
    MixedPrecisionCallback,
    PruningCallback,
    PTQCallback,
    QATCallback,
    StructuredPruningCallback,
    load_compressed,
)
from tests.models import MLP, built, fit, quiet_trainer

ROWS: list[tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]] = [
    (LowRankCallback, {"rank": 4}, {"rank": 2}),
    (FactorizationCallback, {"kind": "nmf", "rank": 4}, {"kind": "nmf", "rank": 2}),
    (CPCallback, {"rank": 4}, {"rank": 2}),
    (LoRACallback, {"r": 4}, {"r": 2}),
    (QATCallback, {"bits": 8}, {"bits": 4}),
    (PTQCallback, {"bits": 8}, {"bits": 4}),
    (MixedPrecisionCallback, {"average_bits": 6}, {"average_bits": 4}),
    (StructuredPruningCallback, {"sparsity": 0.25, "round_to": 1}, {"sparsity": 0.5, "round_to": 1}),
]
over_rows = pytest.mark.parametrize(("make", "first", "second"), ROWS, ids=[make.__name__ for make, *_ in ROWS])


def once(directory: Path, model: MLP, *callbacks: Any, **options: Any) -> None:
    fit(quiet_trainer(directory, callbacks, **options), model)


@over_rows
def test_options_that_change_nothing_are_said(
    make: Callable[..., Any], first: Any, second: Any, tmp_path: Path, package_log: Any
) -> None:
    model: Any = built(MLP)
    once(tmp_path, model, make(**first))
    structure = {key: tensor.shape for key, tensor in model.state_dict().items()}
    once(tmp_path, model, make(**first))
    assert "They stay as they are" not in package_log.text
    once(tmp_path, model, make(**second))
    changed = [name for name in second if first[name] != second[name]]
    assert all(f"{name}={second[name]!r}" in package_log.text for name in changed)
    assert all(f"made with {name}={first[name]!r}" in package_log.text for name in changed)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == structure


@over_rows
def test_a_resume_with_other_options_says_so(
    make: Callable[..., Any], first: Any, second: Any, tmp_path: Path, package_log: Any
) -> None:
    trainer = quiet_trainer(tmp_path, [make(**first)])
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(quiet_trainer(tmp_path, [make(**first)], max_epochs=2), built(MLP), ckpt_path=tmp_path / "last.ckpt")
    assert "They stay as they are" not in package_log.text
    fit(quiet_trainer(tmp_path, [make(**second)], max_epochs=2), built(MLP), ckpt_path=tmp_path / "last.ckpt")
    assert "They stay as they are" in package_log.text


def test_pruning_goes_on_to_a_higher_sparsity(tmp_path: Path, package_log: Any) -> None:
    model: Any = built(MLP)
    make = partial(PruningCallback, include=["fc1"], min_saving=0.0)
    once(tmp_path, model, make(sparsity=0.3))
    once(tmp_path, model, make(sparsity=0.8))
    assert float((model.fc1.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.01)
    assert "They stay as they are" not in package_log.text


def test_a_name_of_its_own_reaches_other_layers(tmp_path: Path) -> None:
    model: Any = built(MLP)
    once(tmp_path, model, LowRankCallback(rank=4, include=["fc1"]))
    once(tmp_path, model, LowRankCallback(rank=2, include=["fc2"], name="second"))
    assert model.fc1.spec["rank"] == 4
    assert model.fc2.spec["rank"] == 2


def test_options_are_plain_text_in_a_checkpoint(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [QATCallback(overrides={"fc1": {"bits": 4}})])
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["QATCallback(qat)"]["options"]
    assert stored["overrides"] == "{'fc1': {'bits': 4}}"


def test_options_that_are_not_known_are_not_recorded(tmp_path: Path) -> None:
    """Of a checkpoint that was loaded, not resumed, nobody knows the options: those of now would be a wrong record."""
    trainer = quiet_trainer(tmp_path, [LowRankCallback(rank=4)])
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = LowRankCallback(rank=2)
    model: Any = load_compressed(MLP, tmp_path / "last.ckpt")
    once(tmp_path, model, again)
    assert model.fc1.spec["rank"] == 4
    assert again.state_dict()["options"] is None
