"""Gradients under 16-bit mixed precision: a step that overflows decides nothing, and no factor enters the scores."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from pquant_lightning import PruningCallback, StructuredPruningCallback, UnstructuredPruning
from pquant_lightning.core._private import takes_off_scale
from pquant_lightning.core.compression_method import CompressionContext
from tests.models import MLP, Inputs, built, fit, quiet_trainer

ALL: dict[str, Any] = {"include": ["*"], "min_saving": 0.0}


class Overflowing(MLP):
    """Infinite in the gradient of its second batch, which the scaler answers by passing over the step."""

    fused = False

    def training_step(self, batch: Inputs, batch_idx: int) -> Tensor:  # type: ignore[override]
        loss = self.loss(batch)
        return loss * 1e30 if batch_idx == 1 and self.current_epoch == 0 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, fused=self.fused)


class Fused(Overflowing):
    fused = True


def trained(callback: Any, directory: Path, model: Any = Overflowing, **options: Any) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    precision = MixedPrecision("16-mixed", "cpu", scaler=scaler)  # type: ignore[arg-type]
    options = {"max_epochs": 2, **options}
    return fit(quiet_trainer(directory, [callback], plugins=[precision], **options), built(model)), scaler


@pytest.mark.parametrize("criterion", ["snip", "taylor", "movement"])
def test_one_overflowing_step_decides_nothing(criterion: str, tmp_path: Path) -> None:
    model, scaler = trained(PruningCallback(sparsity=0.5, criterion=criterion, **ALL), tmp_path)
    assert scaler.get_scale() < 2.0**10  # there was one
    zeros = {name: (p == 0).float().mean().item() for name, p in model.named_parameters() if p.dim() > 1}
    count = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    assert sum(zeros[n] * count[n] for n in zeros) / sum(count.values()) == pytest.approx(0.5, abs=0.005)
    assert max(zeros.values()) < 0.9


def test_of_structured_pruning_too(tmp_path: Path) -> None:
    callback = StructuredPruningCallback(sparsity=0.5, criterion="taylor", min_saving=0.0)
    trained(callback, tmp_path)
    assert all(score.isfinite().all() for score in callback._state["scores"])


class Scores(PruningCallback):
    """Keeps what it has seen of each step."""

    def __init__(self) -> None:
        super().__init__(sparsity=0.5, criterion="movement", start=0.9, end=0.9, **ALL)
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, *args: Any) -> None:
        super().on_before_optimizer_step(*args)
        if self._state["scores"]:  # until the masks are chosen
            self.seen.append(self._state["scores"]["fc1.weight"].clone())


def test_optimizers_that_take_the_factor_off_themselves_show_the_same_gradients(tmp_path: Path) -> None:
    first, second = Scores(), Scores()
    trained(first, tmp_path / "a", max_steps=6)
    model, _ = trained(second, tmp_path / "b", Fused, max_steps=6)
    assert takes_off_scale(model.optimizers().optimizer)
    assert len(first.seen) > 2
    assert torch.equal(first.seen[0], first.seen[1])  # the second step overflowed
    assert not torch.equal(first.seen[1], first.seen[2])
    for one, other in zip(first.seen, second.seen, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_gradients_of_the_whole_optimizer_count(value: float, tmp_path: Path) -> None:
    class OneInfinite(MLP):
        def on_after_backward(self) -> None:
            assert self.head.bias.grad is not None
            self.head.bias.grad[1] = value  # not of a weight that is pruned

    callback = PruningCallback(sparsity=0.5, criterion="snip", **ALL)
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=1), built(OneInfinite))
    assert callback._state["scores"] == {}
    assert all((p != 0).all() for p in model.parameters() if p.dim() > 1)


def test_a_layer_whose_gradients_were_never_seen_is_ranked_by_itself() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})
    method, context = UnstructuredPruning(criterion="snip", sparsity=0.5, **ALL), CompressionContext(by="test")
    method.apply(model, method.plan(model, context), context)
    model["used"](torch.randn(4, 8)).sum().backward()
    method.observe(model, context.state)
    before = model["unused"].weight.detach().abs()
    method.step(model, context.state, 1.0)
    for layer in model.values():
        assert int((layer.weight == 0).sum()) == 32
    gone = model["unused"].weight == 0
    assert before[gone].max() < before[~gone].min()
