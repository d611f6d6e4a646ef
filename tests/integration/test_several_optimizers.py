"""GANs: of one optimizer's step and gradients, methods take what that optimizer holds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pquant_lightning import (
    CompressionMethodRegistry,
    FactorizationCallback,
    LowRankCallback,
    PruningCallback,
    StructuredPruningCallback,
)
from pquant_lightning.core.compression_method import CompressionMethod
from tests.models import BATCHES, MLP, Inputs, fit, quiet_trainer


class Gan(MLP):
    """Both losses are computed first, then one part is stepped before the other's backward pass, as in Ganomaly."""

    def __init__(self) -> None:
        super().__init__()
        del self.fc1, self.fc2, self.head
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
        self.touched: list[tuple[str, list[str]]] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.generator(x))

    def training_step(self, batch: Inputs, batch_idx: int) -> None:
        x = batch[0]
        fake = self.generator(x)
        loss_critic = self.critic(fake.detach()).mean() - self.critic(x).mean()
        loss_generator = (fake - x).square().mean()
        for name, loss in (("critic", loss_critic), ("generator", loss_generator)):
            optimizer = self.optimizers()[0 if name == "critic" else 1]
            optimizer.zero_grad()
            self.manual_backward(loss if name == "critic" else loss - self.critic(fake).mean())
            before = {n: p._version for n, p in self.named_parameters()}
            optimizer.step()
            self.touched.append((name, [n for n, p in self.named_parameters() if p._version != before[n]]))

    def validation_step(self, batch: Inputs, batch_idx: int) -> None:
        self.log("val_loss", self(batch[0]).mean())

    def predict_step(self, batch: Inputs, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.01) for part in (self.critic, self.generator)]


EVERY = {"min_saving": 0.0}
PROJECTING = {
    "masks": lambda: PruningCallback(sparsity=0.5, schedule="constant", include=["*"]),
    "channels": lambda: StructuredPruningCallback(sparsity=0.5, schedule="constant", **EVERY),
    "sparse": lambda: FactorizationCallback(kind="sparse_low_rank", param_ratio=0.6),
    "nonnegative": lambda: FactorizationCallback(kind="nmf", rank=2, **EVERY),
    "retracted": lambda: LowRankCallback(rank=2, retract="balanced"),
}


@pytest.mark.parametrize("make", PROJECTING.values(), ids=PROJECTING)
def test_a_step_writes_into_its_own_parameters_only(make: Callable[[], Any], tmp_path: Path) -> None:
    callback, model = make(), Gan()

    fit(quiet_trainer(tmp_path, [callback], max_epochs=2), model)

    assert len(model.touched) == 2 * 2 * BATCHES
    for part, names in model.touched:
        assert names
        assert all(name.startswith(part) for name in names)


def test_every_projecting_method_is_tried() -> None:
    methods = {type(make().method) for make in PROJECTING.values()}
    projecting = {
        CompressionMethodRegistry.get_class(name)
        for name in CompressionMethodRegistry.list_available()
        if getattr(CompressionMethodRegistry.get_class(name), "project", None) not in (None, CompressionMethod.project)
    }

    assert {cls for cls in projecting if cls.__module__.startswith("pquant_lightning.")} == methods


def test_zeros_stay_zero_under_every_optimizer(tmp_path: Path) -> None:
    model = Gan()

    fit(quiet_trainer(tmp_path, [PROJECTING["masks"]()], max_epochs=2), model)

    matrices = [p for p in model.parameters() if p.dim() > 1]
    zeros = sum(int((p == 0).sum()) for p in matrices)
    assert zeros == sum(p.numel() for p in matrices) // 2


@pytest.mark.parametrize("criterion", ["snip", "taylor", "movement"])
def test_scores_are_of_the_gradients_of_the_own_loss(criterion: str, tmp_path: Path) -> None:
    """The same scores as where each part is trained alone, by an optimizer of its own."""
    options = {"sparsity": 0.5, "criterion": criterion, "start": 0.9, "end": 1.0, "include": ["*"]}
    callback, model = PruningCallback(**options), Gan()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = quiet_trainer(tmp_path, [callback], max_steps=2)
    fit(trainer, model)

    reference = Gan()
    reference.load_state_dict(start)
    x = next(iter(model.loader()))[0]
    fake = reference.generator(x)
    loss = reference.critic(fake.detach()).mean() - reference.critic(x).mean()
    gradient = torch.autograd.grad(loss, reference.critic[2].weight)[0]
    product = reference.critic[2].weight.detach() * gradient
    expected = {"snip": 0.05 * product.abs(), "taylor": 0.05 * product.square(), "movement": -product}[criterion]

    torch.testing.assert_close(callback._state["scores"]["critic.2.weight"], expected)
