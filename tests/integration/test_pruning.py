"""Pruning in a Trainer: exact zeros after every step, masks that survive, and what goes with other callbacks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pquant_lightning import (
    LowRankCallback,
    PruningCallback,
    QATCallback,
    UnstructuredPruning,
    compress_model,
    finalize,
    load_compressed,
)
from pquant_lightning.core.errors import CheckpointError, ModelError
from pquant_lightning.core.schedule import scheduled
from pquant_lightning.methods.pruning.unstructured import _keep_globally
from tests.integration._helpers import assert_equal, tensors
from tests.models import BATCHES, MLP, ConvNet, Inputs, SmallModule, built, fit, quiet_trainer

ALL = {"include": ["*"], "min_saving": 0.0}
EPOCHS = 4
LAST = EPOCHS * BATCHES - 1
PRUNABLE = 16 * 32 + 32 * 24 + 24 * 4


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}


def share(model: nn.Module) -> float:
    found = zeros(model)
    return sum(int(z.sum()) for z in found.values()) / sum(z.numel() for z in found.values())


class Watch(Callback):
    """Notes the zeros at the start of each training batch, and after each batch, which may be an optimizer step."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.starts.append(zeros(pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ends.append(zeros(pl_module))

    def check(self) -> None:
        """Zeros stay through each step, and grow from batch to batch."""
        for start, end in zip(self.starts, self.ends, strict=True):
            assert all(torch.equal(start[name], end[name]) for name in start)
        for before, after in zip(self.ends, self.starts[1:], strict=False):
            assert all((after[name] | ~before[name]).all() for name in before)


class Momentum(MLP):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


class Manual(MLP):
    """Two optimizers, stepped by hand in turns."""

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__(lr, width)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        last = [*self.fc2.parameters(), *self.head.parameters()]
        return [torch.optim.Adam(self.fc1.parameters(), lr=0.01), torch.optim.SGD(last, lr=0.1, momentum=0.9)]

    def training_step(self, batch: Inputs, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (MLP, {}),
        (Momentum, {}),
        (Manual, {}),
        (Momentum, {"accumulate_grad_batches": 3}),
        (Momentum, {"gradient_clip_val": 0.1}),
        (MLP, {"precision": "bf16-mixed"}),
        (MLP, {"precision": "bf16-true"}),
        (ConvNet, {}),
    ],
    ids=str,
)
def test_masked_weights_are_zero_after_every_step(model: Any, options: dict[str, Any], tmp_path: Path) -> None:
    watch = Watch()
    callback = PruningCallback(sparsity=0.8, end=0.5, **ALL)
    trained = fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS, **options), built(model))
    watch.check()
    assert share(trained) == pytest.approx(0.8, abs=0.005)
    assert any(
        not torch.equal(before[name], after[name])
        for before, after in zip(watch.starts, watch.starts[1:], strict=False)
        for name in before
    )


@pytest.mark.parametrize("schedule", ["constant", "linear", "cubic", "cosine", "exponential", "steps"])
def test_sparsity_is_that_of_the_schedule(schedule: str, tmp_path: Path) -> None:
    watch = Watch()
    callback = PruningCallback(sparsity=0.9, schedule=schedule, start=0.2, end=0.6, interval=1, **ALL)
    fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS), built(MLP))
    for index, found in enumerate(watch.starts):
        expected = scheduled(schedule, index / LAST, 0.9, start=0.2, end=0.6)
        assert sum(int(z.sum()) for z in found.values()) == pytest.approx(round(expected * PRUNABLE), abs=1), index


def chosen(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    levels: list[float] = []
    choose = UnstructuredPruning._choose

    def counted(self: Any, model: Any, state: Any, level: float) -> Any:
        levels.append(level)
        return choose(self, model, state, level)

    monkeypatch.setattr(UnstructuredPruning, "_choose", counted)
    return levels


@pytest.mark.parametrize(
    ("interval", "batches"),
    [("epoch", [0, 4, 8, 12]), (1, list(range(16))), (3, [0, 3, 6, 9, 12, 15]), (None, list(range(16)))],
)
def test_masks_are_chosen_at_each_interval(
    interval: Any, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = chosen(monkeypatch)
    callback = PruningCallback(sparsity=0.9, schedule="linear", end=0.75, interval=interval, **ALL)
    fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), built(MLP))
    due = sorted({*batches, 12})  # 12 is the first batch at or after the end, whatever the interval
    expected = [min(batch / LAST / 0.75, 1.0) for batch in due]
    wanted = [level for index, level in enumerate(expected) if level > 0 and 1.0 not in expected[:index]]
    assert levels == pytest.approx(wanted, abs=0.011 if interval is None else 1e-9)


def test_without_an_interval_masks_are_chosen_a_hundred_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    levels = chosen(monkeypatch)
    fit(quiet_trainer(tmp_path, [PruningCallback(sparsity=0.9, **ALL)], max_epochs=100), built(MLP))
    assert len(levels) == 100
    assert levels[-1] == 1


def test_a_schedule_that_ends_within_the_last_epoch_is_completed(tmp_path: Path) -> None:
    model = fit(quiet_trainer(tmp_path, [PruningCallback(sparsity=0.5, end=0.9, interval="epoch", **ALL)]), built(MLP))
    assert share(model) == pytest.approx(0.5, abs=1e-3)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"criterion": "snip", "interval": 2}, {"criterion": "movement"}, {"rewind": 0.1}]
)
def test_a_resumed_fit_equals_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    def run(place: str, **resume: Any) -> Any:
        keep = ModelCheckpoint(tmp_path / place, filename="{epoch}", save_top_k=-1)
        callbacks = [PruningCallback(sparsity=0.8, end=0.8, **ALL, **options), keep]
        return fit(quiet_trainer(tmp_path / place, callbacks, max_epochs=EPOCHS), built(Momentum), **resume)

    whole = run("whole")
    for epoch in range(EPOCHS - 1):
        resumed = run(f"from{epoch}", ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert_equal(tensors(resumed), tensors(whole))


def test_masks_come_back_within_an_epoch(tmp_path: Path) -> None:
    watch = Watch()
    options = {"sparsity": 0.8, "end": 0.3, **ALL}
    trainer = quiet_trainer(tmp_path, [PruningCallback(**options)], max_steps=7, max_epochs=EPOCHS)
    stopped = fit(trainer, built(Momentum))
    trainer.save_checkpoint(tmp_path / "within.ckpt")
    resumed = quiet_trainer(tmp_path, [PruningCallback(**options), watch], max_epochs=EPOCHS)
    fit(resumed, built(Momentum, seed=1), ckpt_path=tmp_path / "within.ckpt")
    expected = zeros(stopped)
    assert all((watch.starts[0][name] | ~expected[name]).all() for name in expected)
    watch.check()


def test_the_checkpoint_loads_into_the_plain_model_with_plain_lightning(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, [PruningCallback(sparsity=0.8, **ALL)], max_epochs=EPOCHS)
    model = fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    masks = checkpoint["callbacks"]["PruningCallback(unstructured_pruning)"]["state"]["masks"]
    assert sum(mask.numel() * mask.element_size() for mask in masks.values()) == PRUNABLE // 8
    plain = MLP.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_equal(tensors(plain), tensors(model))
    assert set(plain.state_dict()) == set(MLP().state_dict())


def test_the_best_checkpoint_is_at_the_target(tmp_path: Path) -> None:
    class Worse(MLP):
        def validation_step(self, batch: Inputs, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    callback = PruningCallback(sparsity=0.8, end=0.5, **ALL)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    fit(quiet_trainer(tmp_path, [callback, best], max_epochs=EPOCHS), Worse())
    assert share(load_compressed(Worse, best.best_model_path)) == pytest.approx(0.8, abs=1e-3)
    assert share(load_compressed(Worse, callback.artifact)) == pytest.approx(0.8, abs=1e-3)


def test_the_artefact_is_smaller(tmp_path: Path) -> None:
    callback: Any = PruningCallback(sparsity=0.95)
    wide = MLP(width=512)
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), wide)
    size = callback.artifact.stat().st_size
    dense = sum(4 * p.numel() for p in model.parameters())
    assert callback.report.size_bytes[0] == dense
    assert 0 < size - callback.report.size_bytes[1] < 2000  # the header
    kept = int((model.fc2.weight != 0).sum())
    assert callback.report.size_bytes[1] == dense - 4 * 512 * 24 + 4 * kept + 512 * 24 // 8
    assert torch.equal(load_compressed(MLP, callback.artifact, width=512).fc2.weight, model.fc2.weight)
    metrics = model.trainer.callback_metrics
    assert metrics["pquant/sparsity"] == pytest.approx(0.95, abs=1e-4)
    total = sum(p.numel() for p in model.parameters())
    assert metrics["pquant/model_sparsity"] == pytest.approx((512 * 24 - kept) / total, abs=1e-4)


def test_a_file_without_the_callback_is_not_resumed(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    fit(trainer, built(MLP))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="was written without PruningCallback"):
        fit(quiet_trainer(tmp_path, [PruningCallback()], max_epochs=2), MLP(), ckpt_path=tmp_path / "plain.ckpt")


# -- fits after fits ---------------------------------------------------------------------------------------------------


def test_a_second_fit_keeps_the_masks(tmp_path: Path) -> None:
    callback = PruningCallback(sparsity=0.8, **ALL)
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), built(Momentum))
    found = zeros(model)
    fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), model)
    assert all(torch.equal(mask, found[name]) for name, mask in zeros(model).items())


def test_a_second_fit_keeps_the_zeros_of_quantized_layers(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        return [PruningCallback(sparsity=0.8, **ALL), QATCallback(min_saving=0.0)]

    model = fit(quiet_trainer(tmp_path, callbacks(), max_epochs=EPOCHS), built(Momentum))
    found, watch = zeros(model), Watch()
    fit(quiet_trainer(tmp_path, [*callbacks(), watch], max_epochs=2), model)
    watch.check()
    assert all(torch.equal(mask, found[name]) for name, mask in zeros(model).items() if name.endswith("weight"))


def test_another_callback_goes_on_from_the_zeros(tmp_path: Path) -> None:
    model = compress_model(built(Momentum), "unstructured_pruning", sparsity=0.6, **ALL)
    found, watch = zeros(model), Watch()
    fit(quiet_trainer(tmp_path, [PruningCallback(sparsity=0.9, **ALL), watch], max_epochs=EPOCHS), model)
    watch.check()
    assert all((watch.starts[0][name] | ~found[name]).all() for name in found)
    assert share(model) == pytest.approx(0.9, abs=1e-3)


def test_the_same_callback_prunes_another_model(tmp_path: Path) -> None:
    callback = PruningCallback(sparsity=0.8, **ALL)
    for seed in (0, 1):
        model = fit(quiet_trainer(tmp_path, [callback], max_epochs=EPOCHS), built(MLP, seed))
        assert share(model) == pytest.approx(0.8, abs=1e-3)


# -- with other callbacks ----------------------------------------------------------------------------------------------


class Average(EMAWeightAveraging):
    """Keeps the zeros of the averaged model at the end of each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        self.seen = [*getattr(self, "seen", []), (zeros(self._average_model.module), zeros(pl_module))]


def test_the_averaged_model_is_masked(tmp_path: Path) -> None:
    average = Average(decay=0.9, use_buffers=False)
    callbacks = [PruningCallback(sparsity=0.8, end=0.5, **ALL), average]
    model = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    for averaged, trained in average.seen[2:]:
        assert all(torch.equal(averaged[name], trained[name]) for name in trained)
    assert share(model) == pytest.approx(0.8, abs=1e-3)  # its weights are the averages now


def test_stochastic_weight_averaging_is_masked(tmp_path: Path) -> None:
    callbacks = [PruningCallback(sparsity=0.8, end=0.5, **ALL), StochasticWeightAveraging(0.01, swa_epoch_start=0.2)]
    model = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    assert share(model) == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("quantizer", ["ste", "lsq"])
def test_prune_and_quantize_in_one_run(quantizer: str, tmp_path: Path) -> None:
    watch = Watch()
    callback = QATCallback(quantizer=quantizer, min_saving=0.0)
    callbacks: list[Any] = [PruningCallback(sparsity=0.8, end=0.5, **ALL), callback, watch]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    watch.check()
    final: Any = finalize(model)
    for name in ("fc1", "fc2", "head"):
        assert bool((final.get_submodule(name).codes[model.get_submodule(name).weight == 0] == 0).all())
    assert sum(int((getattr(model, n).weight == 0).sum()) for n in ("fc1", "fc2", "head")) == round(0.8 * PRUNABLE)
    artefact: Any = load_compressed(MLP, callback.artifact)
    assert torch.equal(artefact.fc1.codes, final.fc1.codes)
    assert "zeros" in callback.report.layers[0].method


def test_low_rank_factors_are_pruned(tmp_path: Path) -> None:
    watch = Watch()
    callbacks = [LowRankCallback(rank=4, min_saving=0.0), PruningCallback(sparsity=0.5, **ALL), watch]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    watch.check()
    assert share(model) == pytest.approx(0.5, abs=1e-2)
    assert int((model.fc1.first.weight == 0).sum()) > 0


@pytest.mark.parametrize("trained", [False, True])
def test_adapters_are_left_alone_and_what_they_wrap_is_pruned_only_if_it_trains(trained: bool, tmp_path: Path) -> None:
    adapted: Any = compress_model(built(MLP), "lora", r=2, include=["fc2"], modules_to_save=["fc1", "head"])
    adapted.fc2.base.weight.requires_grad_(trained)
    options = {"sparsity": 0.5, "scope": "layer", "end": 0.5, **ALL}
    reasons = {skip.name: skip.reason for skip in UnstructuredPruning(**options).plan(adapted).skipped}
    model: Any = fit(quiet_trainer(tmp_path, [PruningCallback(**options)], max_epochs=EPOCHS), adapted)
    found = {name: int(mask.sum()) for name, mask in zeros(model).items()}
    assert found["fc2.lora_A"] == 0
    assert found["fc2.lora_B"] <= 2  # of 48: those of a dead unit have no gradient
    assert found["fc2.base.weight"] == (384 if trained else 0)
    assert found["fc1.weight"] == 256
    assert "its own weights" in reasons["fc2"]
    assert ("frozen inside the layer" in reasons.get("fc2.base", "")) is not trained


def test_two_pruning_callbacks(tmp_path: Path) -> None:
    callbacks = [
        PruningCallback(sparsity=0.5, include=["fc1"], name="one"),
        PruningCallback(pattern="1:4", include=["fc2"], name="two"),
    ]
    model: Any = fit(quiet_trainer(tmp_path, callbacks, max_epochs=EPOCHS), built(MLP))
    assert [int((layer.weight == 0).sum()) for layer in (model.fc1, model.fc2, model.head)] == [256, 576, 0]
    assert model.trainer.callback_metrics["pquant/sparsity/two"] == 0.75


# -- criteria of a training, rewinding ---------------------------------------------------------------------------------


class Linear(SmallModule):
    """One layer of 16 inputs and 4 outputs whose gradients can be computed by hand."""

    draw = MLP.draw

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(lr)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("criterion", ["snip", "taylor", "movement"])
def test_scores_are_those_of_the_gradients(criterion: str, tmp_path: Path) -> None:
    twin: Any = built(Linear)
    weight, steps = twin.head.weight, []
    for batch, _ in zip(twin.loader(), range(3), strict=False):
        twin.zero_grad()
        twin.loss(batch).backward()
        steps.append((weight * weight.grad).detach())
        with torch.no_grad():
            weight -= 0.1 * weight.grad
            twin.head.bias -= 0.1 * twin.head.bias.grad
    score = torch.zeros_like(weight)
    for product in steps:
        if criterion == "movement":
            score = score - product
        else:
            score = 0.95 * score + 0.05 * (product.abs() if criterion == "snip" else product**2)
    expected = _keep_globally({"": score}, 0.5, None, absolute=False)[""]

    options = {"criterion": criterion, "schedule": "constant", "start": 0.99}
    model: Any = fit(quiet_trainer(tmp_path, [PruningCallback(sparsity=0.5, **options)]), built(Linear))
    assert torch.equal(model.head.weight != 0, expected)


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_criteria_from_data_use_the_training_data(criterion: str, tmp_path: Path) -> None:
    callback = PruningCallback(sparsity=0.5, criterion=criterion, schedule="constant", num_samples=32, **ALL)
    watch = Watch()
    fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=2), built(MLP))
    expected = compress_model(
        built(MLP),
        "unstructured_pruning",
        train_loader=MLP.loader(),
        sparsity=0.5,
        criterion=criterion,
        num_samples=32,
        **ALL,
    )
    assert all(torch.equal(mask, watch.starts[0][name]) for name, mask in zeros(expected).items())
    watch.check()


def test_rewinding_brings_the_first_weights_back(tmp_path: Path) -> None:
    class Look(Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    look = Look()
    callback = PruningCallback(sparsity=0.5, schedule="constant", start=0.6, rewind=0.2, **ALL)
    fit(quiet_trainer(tmp_path, [callback, look], max_epochs=EPOCHS), built(MLP))
    kept, pruned = look.seen[3], look.seen[9]  # batches at 3/15 and 9/15 of the training
    for name, value in pruned.items():
        assert torch.equal(value, kept[name] * (value != 0))
    assert not torch.equal(look.seen[8]["fc1.weight"], kept["fc1.weight"])


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_an_open_ended_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="open-ended"):
        fit(quiet_trainer(tmp_path, [PruningCallback()], max_epochs=-1), built(MLP))


def test_a_training_that_ends_before_the_target_warns(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = True

    fit(quiet_trainer(tmp_path, [PruningCallback(**ALL), Stop()], max_epochs=10), built(MLP))
    assert "reaches its target at 70 % of the training, and the training ended at 8 %" in package_log.text


def test_frozen_layers_are_pruned_by_magnitude(tmp_path: Path) -> None:
    model: Any = built(MLP)
    model.fc2.requires_grad_(False)
    fit(quiet_trainer(tmp_path, [PruningCallback(sparsity=0.5)], max_epochs=2), model)
    assert int((model.fc2.weight == 0).sum()) == 384


class TurnedWeight(MLP):
    """A square layer whose weight is (inputs, outputs), which quantization makes (outputs, inputs)."""

    def __init__(self) -> None:
        super().__init__()
        self.turned = Conv1D(24, 24)
        nn.init.normal_(self.turned.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc2(self.fc1(x).relu()).relu()
        result: Tensor = self.head(self.turned(hidden).relu())
        return result


def test_zeros_of_a_weight_that_another_method_turns_stay_where_they_are(tmp_path: Path) -> None:
    model = built(TurnedWeight)
    compress_model(model, "unstructured_pruning", sparsity=0.5, include=["turned"], inplace=True)
    gone = model.turned.weight.detach() == 0
    callbacks = [PruningCallback(sparsity=0.6, include=["turned"], start=0.5, end=0.9), QATCallback(bits=8)]
    weight = fit(quiet_trainer(tmp_path, callbacks, max_epochs=2), model).turned.weight
    assert gone.float().mean() == 0.5
    assert (weight.T[gone] == 0).all()
    assert (weight == 0).float().mean().item() == pytest.approx(0.6, abs=0.005)
