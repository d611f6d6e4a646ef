"""How a LightningModule is run on its training batches in calibration, and that this leaves no trace."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from pquant_lightning import QATCallback, compress_model
from pquant_lightning.core.calibration import Samples, collect_inputs, run_samples
from pquant_lightning.core.errors import CalibrationError
from pquant_lightning.core.steps import RandomNumbers
from tests.unit.test_batches import Data, Graphs, graphs


class Module(pl.LightningModule):
    """Two layers, with noise in the training, a metric of its own, a running mean and an averaged copy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.drop = nn.Linear(4, 6), nn.Linear(6, 2), nn.Dropout(0.5)
        self.averaged = nn.Linear(4, 6).requires_grad_(False)
        self.register_buffer("steps", torch.zeros(()))
        self.seen: list[float] = []
        self.total = torch.zeros(())
        self.modes: list[bool] = []

    def network(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.fc(x).relu()))

    def forward(self, x: Tensor, horizon: int, *, past: Tensor) -> Tensor:
        raise TypeError("a forecast takes other batches")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch["series"] + torch.randn(()) + random.random() + np.random.rand()
        self.modes.append(self.drop.training)
        self.averaged.weight.mul_(0.5)
        self.steps += 1
        self.total += 1
        self.seen.append(float(x.sum()))
        self.log("loss", x.sum())
        self.logger.experiment.add_scalar("x", 1.0)
        return F.mse_loss(self.network(x), batch["goal"])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


class Forecaster(Module):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.network(batch["series"]), batch["goal"])


BATCHES = [{"series": torch.randn(8, 4), "goal": torch.zeros(8, 2)} for _ in range(3)]


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def attached(module: Module) -> Any:
    """A Trainer as it stands when models are compressed: it can log nothing yet."""
    trainer = Trainer(logger=True, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    module.trainer = trainer
    return trainer


class TestSteps:
    def test_the_training_step_where_nothing_else_fits(self, package_log: pytest.LogCaptureFixture) -> None:
        module = Forecaster()
        samples = Samples.take(BATCHES, 24).fitted_to(module)
        assert "Calibration runs Forecaster.training_step" in package_log.text
        assert "a forecast takes" in package_log.text or "requires" in package_log.text
        found = collect_inputs(module, ["fc", "head"], samples)
        assert found["fc"].maximum == max(float(batch["series"].max()) for batch in BATCHES)
        hidden = torch.cat([module.fc(batch["series"]).relu() for batch in BATCHES])
        torch.testing.assert_close(found["head"].mean, hidden.mean(0).detach())  # without dropout

    def test_predict_step_comes_first_and_then_forward(self) -> None:
        class Predicts(Module):
            def predict_step(self, batch: Any) -> Tensor:
                return self.network(batch["series"])

        class Calls(Module):
            def forward(self, series: Tensor) -> Tensor:
                return self.network(series)

        for module, name in ((Predicts(), "predict_step"), (Calls(), "forward")):
            samples = Samples.take(BATCHES, 24).fitted_to(module)
            assert samples.run.name == name  # type: ignore[attr-defined]
            assert collect_inputs(module, ["fc"], samples)

    def test_nothing_is_left_behind(self) -> None:
        module = Module()
        trainer = attached(module)
        logger, before = trainer.loggers, {k: v.clone() for k, v in module.state_dict().items()}
        held, numbers = module.total, states()
        samples = Samples.take(BATCHES, 24).fitted_to(module)
        losses = torch.stack(list(run_samples(module, samples)))
        assert samples.run.name == "training_step"  # type: ignore[attr-defined]
        assert module.seen == [] == module.modes
        assert module.total is held
        assert float(held) == 0
        assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
        assert states() == numbers
        assert trainer.loggers == logger
        assert "log" not in vars(module)
        assert torch.equal(losses, torch.stack(list(run_samples(module, samples))))  # the same noise in every pass
        assert len({float(loss) for loss in losses}) == 3

    def test_a_step_that_needs_training_mode_runs_in_it_without_dropout(self) -> None:
        modes = []

        class Detector(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc, self.norm, self.drop = nn.Linear(4, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Any:
                modes.append((self.training, self.drop.training, self.norm.training))
                out = self.drop(self.norm(self.fc(x)))
                return {"loss": out.sum()} if self.training else [out]

        class Detects(Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = Detector()

            def training_step(self, batch: Any) -> Tensor:  # type: ignore[override]
                return sum(self.net(batch["series"]).values())

        module = Detects()
        samples = Samples.take(BATCHES, 24).fitted_to(module)
        modes.clear()
        assert collect_inputs(module, ["net.fc"], samples)
        assert set(modes) == {(True, False, False)}
        assert module.net.training
        assert module.net.drop.training

    def test_manual_optimization_is_not_run(self) -> None:
        class Manual(Module):
            automatic_optimization = False

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                raise AssertionError("it would train")

        samples = Samples.take(BATCHES, 24).fitted_to(Manual())
        with pytest.raises(CalibrationError, match=r"Manual cannot be run .*forward:.* predict_step") as error:
            list(run_samples(Manual(), samples))
        assert "it would train" not in str(error.value)

    def test_batches_go_through_the_hooks_of_their_transfer(self) -> None:
        class Scales(Module):
            def forward(self, x: Tensor) -> Tensor:
                return self.network(x)

            def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return batch / 255

        class Source(LightningDataModule):
            def train_dataloader(self) -> Any:
                return DataLoader(torch.full((8, 4), 51.0), 4)

            def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
                return batch * 5

        module = Scales()
        found = collect_inputs(module, ["fc"], Samples.take(Source(), 8).fitted_to(module))
        assert found["fc"].maximum == 1

    def test_other_models_and_other_ways_stay(self) -> None:
        samples = Samples.take([torch.zeros(2, 4)], 2)
        assert samples.fitted_to(nn.Sequential(nn.Linear(4, 4))) is samples


def test_random_numbers_of_their_own() -> None:
    before, own = states(), RandomNumbers(3)

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    with own:
        first = draw()
    with own:
        second = draw()
    assert states() == before
    with RandomNumbers(3):
        again = draw()
    assert first == again
    assert all(one != other for one, other in zip(first, second, strict=True))


def test_a_loader_that_draws_in_numpy_and_python_moves_nothing() -> None:
    def batches() -> Any:
        while True:
            yield torch.full((2, 1), random.random() + np.random.rand())

    before = states()
    Samples.take(batches(), 8)
    assert states() == before


class GraphNet(pl.LightningModule):
    """As torch_geometric's users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, nodes: Tensor, graph_of: Tensor) -> Tensor:
        return self.head(torch.zeros(int(graph_of.max()) + 1, 16).index_add_(0, graph_of, self.fc(nodes).relu()))

    def training_step(self, batch: Graphs, batch_idx: int) -> Tensor:
        self.log("size", float(batch.num_graphs), batch_size=batch.num_graphs)
        return self(batch.x, batch.batch).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-4)


def test_graphs_calibrate_a_fit(package_log: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    drawn = []

    class Draws(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            drawn.append(states())

    loader = DataLoader([graphs() for _ in range(4)], None)
    for callbacks in ([Draws()], [QATCallback(bits=8, num_samples=6), Draws()]):
        pl.seed_everything(1, verbose=False)
        module = GraphNet()
        pl.seed_everything(2, verbose=False)
        trainer = Trainer(
            max_steps=2,
            callbacks=callbacks,
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        trainer.fit(module, loader)
    assert drawn[0] == drawn[1]
    assert "Calibration runs GraphNet.training_step" in package_log.text
    assert "never reached" not in package_log.text
    assert module.fc.known


def test_compress_model_takes_training_batches() -> None:
    small = compress_model(Forecaster(), "ptq", train_loader=BATCHES)
    assert type(small.fc).__name__.startswith("Int")
    alone = Data(x=torch.randn(5, 4))
    assert Samples.take([alone, alone], 1).count == 1
