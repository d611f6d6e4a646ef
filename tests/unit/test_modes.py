"""Models that were loaded or finalized train again as they would have before."""

from pathlib import Path

import pytest
import torch
from torch import nn

from pquant_lightning import (
    CompressionPipeline,
    EvaluationPipeline,
    LowRankCallback,
    PipelineStage,
    compress_model,
    finalize,
    load_compressed,
    save_compressed,
)
from tests.models import MLP, fit, quiet_trainer

QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}


class Modes(MLP):
    """Notes the modes in which it trains; its norm is frozen by its author."""

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__(lr, width)
        self.dropout, self.frozen = nn.Dropout(0.5), nn.BatchNorm1d(16).eval()
        self.seen: dict[str, bool] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.dropout(self.frozen(x)))

    def training_step(self, batch: tuple[torch.Tensor, ...], batch_idx: int) -> torch.Tensor:
        self.seen = {name: module.training for name, module in self.named_modules()}
        return super().training_step(batch, batch_idx)


def as_made(model: Modes) -> None:
    assert model.seen
    assert {name for name, training in model.seen.items() if not training} == {"frozen"}


def half_compressed() -> nn.Module:
    return compress_model(Modes(), "low_rank", rank=4, min_saving=0.0, include=["fc1"])


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return save_compressed(half_compressed(), tmp_path / "small.safetensors")


@pytest.mark.parametrize("given", ["class", "model", "model in eval mode"])
def test_a_loaded_model_trains(given: str, artifact: Path, tmp_path: Path) -> None:
    model = load_compressed({"class": Modes, "model": Modes()}.get(given, Modes().eval()), artifact)
    assert not any(module.training for module in model.modules())
    before = model.frozen.running_mean.clone()
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2, name="again", min_saving=0.0)]), model)
    if given == "model in eval mode":  # which the user has chosen, as a Trainer leaves it
        assert not any(model.seen.values())
    else:
        as_made(model)
    assert torch.equal(model.frozen.running_mean, before)


def test_a_finalized_model_trains(tmp_path: Path) -> None:
    model = finalize(half_compressed())
    assert not model.training
    fit(quiet_trainer(tmp_path, [LowRankCallback(rank=2, min_saving=0.0)]), model)
    as_made(model)


@pytest.mark.parametrize("evaluated", ["load_compressed", "EvaluationPipeline", "eval"])
def test_a_pipeline_trains_a_model_that_was_looked_at(evaluated: str, artifact: Path, tmp_path: Path) -> None:
    model = Modes()
    modes = [module.training for module in model.modules()]
    if evaluated == "load_compressed":
        model = load_compressed(model, artifact)
    elif evaluated == "EvaluationPipeline":
        EvaluationPipeline(["output_error", "val_loss"]).run(model, Modes(), MLP.loader())
        assert [module.training for module in model.modules()] == modes
    else:
        model.eval()
        model.seen = {}
    stage = PipelineStage(
        [{"low_rank": {"rank": 2, "min_saving": 0.0}}], epochs=1, trainer={"enable_progress_bar": False}
    )
    result = CompressionPipeline([stage]).run(model, MLP.loader())
    trained = {name for name, training in result.model.seen.items() if training}
    assert {"", "dropout", "fc1"} <= trained
    assert ("frozen" in trained) == (evaluated == "eval")  # only where nothing has noted what was in eval mode
    assert not any(module.training for module in result.model.modules())
