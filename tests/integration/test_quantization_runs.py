"""Quantization in a Trainer: what a run does at which time, with odd data, odd precisions, stops and resumes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from pquant_lightning import (
    LowRankCallback,
    PTQCallback,
    QATCallback,
    QATCompression,
    compress_model,
    finalize,
    load_compressed,
)
from pquant_lightning.core.compressed_layer import changed_layers, compressed_layers
from pquant_lightning.core.errors import CalibrationError
from tests.integration._helpers import assert_equal, tensors
from tests.models import BATCHES, MLP, MODELS, ConvNet, Inputs, SmallModule, Transformer, built, fit, quiet_trainer

ALL_BITS = {"bits": 4, "first_last_bits": 4, "min_saving": 0.0}


class Watch(Callback):
    """Notes something about the model at the start of every training batch, after the methods have acted."""

    def __init__(self, look: Any) -> None:
        self.look, self.seen = look, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.look(pl_module))


def error(expected: Tensor, found: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def outputs(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(*inputs)
    return result


def shuffled(model: type[SmallModule]) -> DataLoader[Inputs]:
    return DataLoader(model.loader().dataset, 8, shuffle=True)


# -- before, during and after ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"scheme": "dynamic"}, {"scheme": "weight_only", "bits": 4}])
def test_ptq_does_not_touch_the_training(options: dict[str, Any], tmp_path: Path) -> None:
    """Also with dropout and a shuffling loader: calibration draws no random number of the training's."""

    class Dropping(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.1, self.training))

    found = []
    for place, callbacks in {"plain": [], "ptq": [PTQCallback(min_saving=0.0, **options)]}.items():
        model: Any = built(Dropping)
        torch.manual_seed(3)
        quiet_trainer(tmp_path / place, callbacks, max_epochs=2).fit(model, shuffled(ConvNet))
        found.append({name: p.detach() for name, p in model.named_parameters()})
        found.append({name: b for name, b in model.named_buffers() if name.startswith("bn")})
    assert_equal(found[2], found[0])
    assert_equal(found[3], found[1])


@pytest.mark.parametrize("options", [{}, {"scheme": "dynamic"}, {"scheme": "weight_only", "bits": 8}])
@pytest.mark.parametrize("name", MODELS)
def test_the_ptq_artefact_is_integer_and_close(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model_class = MODELS[name]
    callback = PTQCallback(min_saving=0.0, **options)
    model = fit(quiet_trainer(tmp_path, [callback], max_epochs=2), model_class())
    artefact = load_compressed(model_class, callback.artifact)
    layers = {key: layer for key, layer in compressed_layers(artefact).items() if "codes" in layer._buffers}
    assert len(layers) == len(changed_layers(model))
    assert {layer.codes.dtype for layer in layers.values()} == {torch.int8}
    inputs = model_class.inputs(64, seed=5)
    assert 0 < error(outputs(model, *inputs), outputs(artefact, *inputs)) < 0.05


def test_calibration_is_that_of_the_last_weights(tmp_path: Path) -> None:
    """The inputs of the second layer depend on the first one's weights, which the training has moved."""
    callback = PTQCallback(observer="minmax", min_saving=0.0)
    model: Any = fit(quiet_trainer(tmp_path, [callback], max_epochs=3), MLP(lr=0.1))
    hidden = F.relu(model.eval().fc1(torch.cat([x for x, _ in MLP.loader()])))
    assert float(model.fc2.act_range[1]) == pytest.approx(hidden.max().item())
    before = model.fc2.act_range.clone()
    fit(quiet_trainer(tmp_path / "again", [callback], max_epochs=3), model)
    hidden = F.relu(model.eval().fc1(torch.cat([x for x, _ in MLP.loader()])))
    assert float(model.fc2.act_range[1]) == pytest.approx(hidden.max().item())
    assert not torch.equal(model.fc2.act_range, before)


def test_the_artefact_of_the_best_checkpoint_is_calibrated_on_its_weights(tmp_path: Path) -> None:
    class Worse(MLP):
        def validation_step(self, batch: Inputs, batch_idx: int) -> None:
            self.log("val_loss", float(self.current_epoch))

    callback = PTQCallback(observer="minmax", scheme="static", correct_bias=False, min_saving=0.0)
    best = ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    model: Any = fit(quiet_trainer(tmp_path, [callback, best], max_epochs=4), Worse(lr=0.1))
    first: Any = load_compressed(Worse, tmp_path / "best.ckpt")
    artefact: Any = load_compressed(Worse, callback.artifact)
    assert error(first.fc2.weight, artefact.fc2.dense_weight()) < 0.01 < error(model.fc2.weight, first.fc2.weight)
    hidden = F.relu(first.fc1(torch.cat([x for x, _ in MLP.loader()])))
    reach = float(artefact.fc2.act_grid[0] * 255)
    assert reach == pytest.approx(hidden.max().item(), rel=1e-4)
    assert abs(reach / float(model.fc2.act_range[1]) - 1) > 0.01


def test_a_checkpoint_of_dynamic_ptq_is_finalized_at_any_time(tmp_path: Path) -> None:
    middle = ModelCheckpoint(tmp_path, filename="middle")
    fit(quiet_trainer(tmp_path, [PTQCallback(scheme="dynamic", correct_bias=False, min_saving=0.0), middle]), MLP())
    loaded = load_compressed(MLP, tmp_path / "middle.ckpt")
    x = MLP.inputs(64)[0]
    final = finalize(loaded)
    assert final.fc1.codes.dtype == torch.int8
    assert 0 < error(outputs(loaded, x), outputs(final, x)) < 0.05


def test_a_resumed_ptq_fit_gives_the_same_artefact(tmp_path: Path) -> None:
    def run(place: str, **options: Any) -> Any:
        callback = PTQCallback(min_saving=0.0)
        keep = ModelCheckpoint(tmp_path / place, filename="{epoch}", save_top_k=-1)
        fit(quiet_trainer(tmp_path / place, [callback, keep], max_epochs=3), built(ConvNet), **options)
        return load_compressed(ConvNet, callback.artifact)

    whole = run("whole")
    resumed = run("resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert_equal(tensors(resumed), tensors(whole))


def test_low_rank_then_ptq(tmp_path: Path) -> None:
    callbacks = [LowRankCallback(rank=4, include=["conv2"], min_saving=0.0), PTQCallback(min_saving=0.0)]
    model = fit(quiet_trainer(tmp_path, callbacks, max_epochs=2), ConvNet())
    artefact: Any = load_compressed(ConvNet, callbacks[-1].artifact)
    assert artefact.bn2.kind == "folded_norm"
    assert artefact.conv2.second.codes.dtype == torch.int8
    x = ConvNet.inputs(64)[0]
    assert 0 < error(outputs(model, x), outputs(artefact, x)) < 0.05


# -- the schedule of quantization-aware training -----------------------------------------------------------------------

EPOCHS = 4
LAST = EPOCHS * BATCHES - 1


def test_training_is_in_floating_point_until_the_start(tmp_path: Path) -> None:
    """The weights are those of a fit without the callback, to the bit, up to the batch at which rounding begins."""
    found = []
    for place, callbacks in {"plain": [], "qat": [QATCallback(start=0.5, quantizer="ste", **ALL_BITS)]}.items():
        watch = Watch(lambda module: module.fc2.weight.detach().clone())
        fit(quiet_trainer(tmp_path / place, [*callbacks, watch], max_epochs=EPOCHS), built(MLP))
        found.append(watch.seen)
    same = [torch.equal(plain, qat) for plain, qat in zip(*found, strict=True)]
    first = next(index for index in range(LAST + 1) if index / LAST >= 0.5)
    assert same == [True] * (first + 1) + [False] * (LAST - first)


def test_bits_fall_one_by_one_during_a_fit(tmp_path: Path) -> None:
    watch = Watch(lambda module: module.fc2.bits_in_force)
    callback = QATCallback(start=0.25, initial_bits=8, end=0.75, **ALL_BITS)
    model = fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS), MLP())
    bits = [weight for weight, _ in watch.seen]
    assert [act for _, act in watch.seen] == bits
    assert bits[0] == 16
    assert list(dict.fromkeys(bits)) == [16, 8, 7, 6, 5, 4]
    assert bits == sorted(bits, reverse=True)
    assert bits.index(4) / LAST <= 0.75 + 1 / LAST
    x = MLP.inputs(64)[0]
    final: Any = finalize(model)
    assert final.fc2.spec["bits"] == 4
    assert error(outputs(model, x), outputs(final, x)) < 1e-4


@pytest.mark.parametrize("quantizer", ["lsq", "pact"])
@pytest.mark.parametrize("options", [{"initial_bits": 8}, {"initial_bits": 8, "start": 0.3}, {}], ids=str)
def test_a_first_batch_gives_the_range_that_it_has_whatever_bits_are_in_force(quantizer: str, options: Any) -> None:
    method = QATCompression(quantizer=quantizer, num_samples=0, **options, **ALL_BITS)
    model: Any = method.compress(built(MLP)).train()
    x = MLP.inputs(64)[0]
    width = 2 * x.abs().max() if quantizer == "pact" else x.max() - x.min()
    for progress in (0.0, 0.2, 0.35, 0.45, 1.0):
        method.step(model, {}, progress)
        model(x)
        bits = model.fc1.bits_in_force[1]
        codes = 2 ** (4 if bits == 16 else bits) - 1
        assert float(model.fc1.act_scale.detach()) * codes == pytest.approx(float(width), rel=0.01), (progress, bits)
    assert bits == 4


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "pact"])
def test_layers_that_are_to_have_more_bits_are_not_lowered_further(quantizer: str, tmp_path: Path) -> None:
    watch = Watch(lambda module: [getattr(module, name).bits_in_force for name in ("fc1", "fc2", "head")])
    options = {**ALL_BITS, "overrides": {"fc1": {"bits": 8}, "head": {"weight_bits": 3, "act_bits": 16}}}
    callback = QATCallback(initial_bits=6, end=0.5, quantizer=quantizer, **options)
    fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS), MLP())
    assert watch.seen[0] == [(8, 8), (6, 6), (6, 16)]
    assert watch.seen[-1] == [(8, 8), (4, 4), (3, 16)]


def test_ranges_and_norms_stand_still_during_a_fit(tmp_path: Path) -> None:
    watch = Watch(lambda module: (module.conv2.act_range.clone(), module.bn1.running_mean.clone()))
    callback = QATCallback(freeze_observers=0.4, freeze_norms=0.8, quantizer="ste", min_saving=0.0)
    fit(quiet_trainer(tmp_path, [callback, watch], max_epochs=EPOCHS), ConvNet())
    for which, share in enumerate((0.4, 0.8)):
        moved = [not torch.equal(a[which], b[which]) for a, b in zip(watch.seen, watch.seen[1:], strict=False)]
        assert moved == [index / LAST < share for index in range(LAST)], (which, share)


def test_scale_lr_is_how_fast_scales_move(tmp_path: Path) -> None:
    """Adam moves a parameter by about the learning rate in each of the first steps."""
    moved = {}
    for scale_lr in (0.001, 1.0):
        watch = Watch(lambda module: module.fc2.act_scale.detach().clone())
        callback = QATCallback(scale_lr=scale_lr, quantizer="lsq", **ALL_BITS)
        fit(quiet_trainer(tmp_path / str(scale_lr), [callback, watch]), built(MLP, seed=1))
        moved[scale_lr] = abs(float(watch.seen[1] - watch.seen[0]))
    assert moved[0.001] == pytest.approx(0.01 * 0.001, rel=0.1)
    assert moved[1.0] == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_schedule_of_the_users_keeps_the_ratio(interval: str, tmp_path: Path) -> None:
    class Scheduled(MLP):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    watch = Watch(lambda module: [(g["lr"], g["weight_decay"]) for g in module.optimizers().param_groups])
    fit(quiet_trainer(tmp_path, [QATCallback(scale_lr=0.2, **ALL_BITS), watch], max_epochs=3), Scheduled())
    assert watch.seen[0] == [(0.01, 0.1), (pytest.approx(0.002), 0.0)]
    assert watch.seen[-1][0][0] < 0.00995
    assert all(scales[0] == pytest.approx(0.2 * weights[0]) for weights, scales in watch.seen)


def test_a_warm_up_and_learned_scales(tmp_path: Path) -> None:
    class WarmUp(MLP):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            parts = [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=1),
                torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
            ]
            return [optimizer], [torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1])]

    model = fit(quiet_trainer(tmp_path, [QATCallback(**ALL_BITS)], max_epochs=3), WarmUp())
    weights, scales = (group["lr"] for group in model.trainer.optimizers[0].param_groups)
    assert scales == pytest.approx(0.1 * weights)


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "pact"])
@pytest.mark.parametrize("options", [{"start": 0.3}, {"initial_bits": 8, "end": 0.9}], ids=["start", "lowered"])
def test_a_resume_midway_goes_on_with_the_bits_in_force(
    quantizer: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def run(place: str, **resume: Any) -> tuple[Any, list[Any]]:
        watch = Watch(lambda module: (module.fc2.bits_in_force, module.fc2.quantized_weight().detach().clone()))
        keep = ModelCheckpoint(tmp_path / place, filename="{epoch}", save_top_k=-1)
        callbacks = [QATCallback(quantizer=quantizer, **ALL_BITS, **options), watch, keep]
        return fit(quiet_trainer(tmp_path / place, callbacks, max_epochs=EPOCHS), built(MLP), **resume), watch.seen

    whole, seen = run("whole")
    stopped = 2 * BATCHES  # the first batch after the checkpoint of the second epoch
    loaded: Any = load_compressed(MLP, tmp_path / "whole" / "epoch=1.ckpt")
    assert loaded.fc2.bits_in_force == seen[stopped - 1][0]
    assert loaded.fc2.bits_in_force[0] < 8
    resumed, again = run("resumed", ckpt_path=tmp_path / "whole" / "epoch=1.ckpt")
    assert [bits for bits, _ in again] == [bits for bits, _ in seen[stopped:]]
    assert torch.equal(again[0][1], seen[stopped][1])
    assert_equal(tensors(resumed), tensors(whole))


# -- options of quantization-aware training, in numbers ----------------------------------------------------------------


def test_overrides_and_first_last_bits_of_qat() -> None:
    def bits(**options: Any) -> dict[str, tuple[int, int]]:
        small = QATCompression(min_saving=0.0, **options).compress(MLP(), MLP.loader())
        return {name: (layer.spec["bits"], layer.spec["act_bits"]) for name, layer in compressed_layers(small).items()}

    assert bits(bits=4) == {"fc1": (8, 8), "fc2": (4, 4), "head": (8, 8)}
    assert bits(bits=4, first_last_bits=6) == {"fc1": (6, 6), "fc2": (4, 4), "head": (6, 6)}
    assert bits(weight_bits=3, act_bits=6, first_last_bits=2) == dict.fromkeys(("fc1", "fc2", "head"), (3, 6))
    several = {"fc?": {"bits": 5}, "fc2": {"weight_bits": 2}, "head": {"act_bits": 16}}
    assert bits(overrides=several) == {"fc1": (5, 5), "fc2": (2, 5), "head": (8, 16)}
    assert bits(overrides={"head": {"bits": 16}}) == {"fc1": (8, 8), "fc2": (8, 8)}


def test_the_order_of_execution_decides_which_layers_are_first_and_last() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(16, 16) for _ in range(3))
            self.never = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x)))

    def bits(**options: Any) -> dict[str, int]:
        small = compress_model(Backwards(), "qat", bits=4, min_saving=0.0, **options)
        return {name: layer.spec["bits"] for name, layer in compressed_layers(small).items()}

    assert bits(train_loader=[torch.randn(8, 16)]) == {"last": 8, "middle": 4, "first": 8, "never": 4}
    assert bits() == {"last": 8, "middle": 4, "first": 4, "never": 8}  # without data: of definition


def test_the_observer_gives_qat_its_first_range() -> None:
    quiet = torch.linspace(-1, 1, 64 * 16).reshape(64, 16)
    loud = quiet.clone()
    loud[0, 0] = 10.0

    def reach(observer: str) -> float:
        method = QATCompression(bits=2, first_last_bits=2, quantizer="ste", observer=observer, min_saving=0.0)
        small: Any = method.compress(nn.Sequential(nn.Linear(16, 16)), [quiet, loud])
        return float(small[0].act_range[1])

    assert reach("minmax") == 10
    assert reach("moving_average") == pytest.approx(1 + 0.1 * (10 - 1))
    assert reach("mse") < 3
    assert reach("histogram") < 3


def test_the_quantizer_changes_what_a_forward_gives() -> None:
    x = MLP.inputs(64)[0]
    plain = outputs(built(MLP), x)
    found = {
        quantizer: outputs(QATCompression(quantizer=quantizer, **ALL_BITS).compress(built(MLP), MLP.loader()), x)
        for quantizer in ("ste", "lsq", "pact", "auto")
    }
    assert torch.equal(found["auto"], found["lsq"])
    assert not torch.equal(found["ste"], found["lsq"])
    assert not torch.equal(found["pact"], found["lsq"])
    assert all(0.02 < error(plain, y) < 0.5 for y in found.values())


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "pact"])
def test_only_inputs_are_rounded_where_weights_have_sixteen_bits(quantizer: str) -> None:
    method = QATCompression(weight_bits=16, act_bits=4, first_last_bits=4, quantizer=quantizer, min_saving=0.0)
    model = built(MLP)
    small: Any = method.compress(model, MLP.loader())
    assert torch.equal(small.fc1.dense_weight(), model.fc1.weight)
    x = MLP.inputs(64)[0]
    assert 0.01 < error(outputs(model, x), outputs(small, x)) < 0.5
    assert len(small.fc1.quantized_input(x).unique()) <= 16


def test_correction_of_the_bias_of_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3, groups=4), nn.BatchNorm2d(16)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    model[1].weight.data.normal_()  # negative factors too
    loader, x = [torch.rand(64, 8, 6, 6) for _ in range(5)], torch.rand(500, 8, 6, 6)

    def shift(correct_bias: bool) -> float:
        options = {"bits": 3, "scheme": "weight_only", "first_last_bits": 3, "min_saving": 0.0}
        small = compress_model(model, "ptq", train_loader=loader, correct_bias=correct_bias, **options)
        assert compressed_layers(small)["1"].kind == "folded_norm"
        return float((outputs(small, x) - outputs(model, x)).mean((0, 2, 3)).norm())

    assert shift(True) < 0.2 * shift(False)


# -- odd data ----------------------------------------------------------------------------------------------------------


class Plain(LightningModule):
    """Batches are dicts whose names `forward` does not know; there is no `predict_step`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)
        self.steps = 0

    def forward(self, pixels: Tensor, mask: Tensor) -> Tensor:
        return self.second(F.relu(self.first(pixels * mask)))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps += 1
        return self(batch["image"], torch.ones(16)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def images() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    batches = [{"image": torch.randn(8, 16, generator=generator), "label": torch.zeros(8)} for _ in range(4)]
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class OnlyInTraining(Plain):
    """Neither its forward nor, before there are optimizers, its training step takes a training batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if not self.trainer.optimizers:
            raise RuntimeError("not in training")
        return super().training_step(batch, batch_idx)


def test_ptq_runs_the_training_step_where_forward_takes_other_batches(tmp_path: Path) -> None:
    callback = PTQCallback(min_saving=0.0)
    quiet_trainer(tmp_path, [callback]).fit(model := Plain(), images())
    assert model.first.known


def test_ptq_says_before_the_training_that_it_cannot_run_the_model(tmp_path: Path) -> None:
    model = OnlyInTraining()
    with pytest.raises(CalibrationError, match="forward requires pixels, mask.*dicts with 'image', 'label'"):
        quiet_trainer(tmp_path, [PTQCallback(min_saving=0.0)]).fit(model, images())
    assert model.steps == 0


@pytest.mark.parametrize("quantizer", ["ste", "lsq", "pact"])
def test_qat_goes_on_without_calibration(quantizer: str, tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    model = OnlyInTraining()
    quiet_trainer(tmp_path, [QATCallback(quantizer=quantizer, **ALL_BITS)]).fit(model, images())
    assert "without calibration: OnlyInTraining cannot be run" in package_log.text
    assert "OnlyInTraining.forward requires pixels, mask" in package_log.text
    args = (next(iter(images()))["image"], torch.ones(16))
    assert model.first.known
    assert error(outputs(model, *args), outputs(finalize(model), *args)) < 1e-4


def test_predict_step_runs_what_forward_cannot(tmp_path: Path) -> None:
    class Predicting(Plain):
        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(2 * batch["image"], torch.ones(16))

    model: Any = Predicting()
    callback = PTQCallback(observer="minmax", min_saving=0.0)
    quiet_trainer(tmp_path, [callback]).fit(model, images())
    every = torch.cat([batch["image"] for batch in images()])
    assert model.first.act_range.tolist() == [float(2 * every.min()), float(2 * every.max())]


def test_several_training_loaders(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    class Two(MLP):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch["a"]) + self.loss(batch["b"])

    loaders = {"a": MLP.loader(seed=0), "b": MLP.loader(seed=1)}
    with pytest.raises(CalibrationError, match="several training loaders"):
        quiet_trainer(tmp_path, [PTQCallback(min_saving=0.0)]).fit(Two(), loaders)
    model: Any = Two()
    quiet_trainer(tmp_path, [QATCallback(min_saving=0.0)]).fit(model, loaders)
    assert "without calibration: There are several training loaders" in package_log.text
    assert model.fc1.known


def test_an_empty_training_loader(tmp_path: Path) -> None:
    empty: Any = DataLoader(TensorDataset(torch.zeros(0, 16), torch.zeros(0).long()), 8)
    with pytest.raises(CalibrationError, match="hold 0 samples"):
        quiet_trainer(tmp_path, [PTQCallback(min_saving=0.0)]).fit(MLP(), empty)


def test_a_small_training_set_is_said_once_per_calibration(
    tmp_path: Path, package_log: pytest.LogCaptureFixture
) -> None:
    fit(quiet_trainer(tmp_path, [QATCallback(min_saving=0.0, num_samples=100)]), MLP())
    assert package_log.text.count("32 samples, and 100 were asked for") == 1
    package_log.clear()
    fit(quiet_trainer(tmp_path, [QATCallback(min_saving=0.0, num_samples=32)]), MLP())
    assert "asked for" not in package_log.text


def test_num_samples_are_what_the_trainer_takes(tmp_path: Path) -> None:
    model: Any = fit(quiet_trainer(tmp_path, [PTQCallback(num_samples=5, observer="minmax", min_saving=0.0)]), MLP())
    first = next(iter(MLP.loader()))[0][:5]
    assert model.fc1.act_range.tolist() == [float(first.min()), float(first.max())]


def test_a_training_that_ends_in_nan_names_a_layer(tmp_path: Path) -> None:
    class Diverging(MLP):
        def on_train_end(self) -> None:
            pass

        def on_train_batch_end(self, *args: Any) -> None:
            with torch.no_grad():
                self.fc1.bias.fill_(torch.nan)

    with pytest.raises(CalibrationError, match="inputs of layer 'fc2' hold NaN"):
        fit(quiet_trainer(tmp_path, [PTQCallback(min_saving=0.0)]), Diverging())


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_data(value: float, tmp_path: Path) -> None:
    target = torch.arange(32) % 4
    loader: Any = DataLoader(TensorDataset(torch.full((32, 3, 8, 8), value), target), 8)
    for method in (PTQCallback, QATCallback):
        callback = method(min_saving=0.0)
        model: Any = ConvNet()
        quiet_trainer(tmp_path / method.__name__, [callback]).fit(model, loader)
        x = torch.full((2, 3, 8, 8), value)
        artefact = load_compressed(ConvNet, callback.artifact)
        assert error(outputs(model, x), outputs(artefact, x)) < 0.02


class Half(MLP):
    """One of its layers is never called."""

    def __init__(self, lr: float = 0.01, width: int = 32) -> None:
        super().__init__(lr, width)
        self.unused = nn.Linear(16, 32)


def test_a_layer_never_reached_stays_float_and_is_named(tmp_path: Path, package_log: pytest.LogCaptureFixture) -> None:
    callback = PTQCallback(min_saving=0.0)
    model: Any = fit(quiet_trainer(tmp_path, [callback]), Half())
    assert "Calibration never reached layer 'unused': floating point" in package_log.text
    rows = {row.name: row for row in callback.report.layers}
    assert "calibration has not reached it" in rows["unused"].method
    assert "calibration has not reached it" not in rows["fc1"].method
    assert rows["unused"].size_bytes[1] >= 4 * 16 * 32
    assert rows["fc1"].size_bytes[1] < 0.5 * rows["fc1"].size_bytes[0]
    artefact: Any = load_compressed(Half, callback.artifact)
    assert torch.equal(artefact.unused.weight, model.unused.weight)
    assert artefact.fc1.codes.dtype == torch.int8
    x = torch.randn(3, 16)
    assert torch.equal(outputs(artefact.unused, x), outputs(model.unused, x))


def test_where_no_layer_is_reached_the_error_says_so() -> None:
    with pytest.raises(CalibrationError, match="reached none of the layers to be quantized .unused.: the model's"):
        compress_model(Half(), "ptq", include=["unused"], train_loader=MLP.loader(), min_saving=0.0)


def test_a_layer_never_reached_in_qat_is_quantized_by_its_weights(tmp_path: Path) -> None:
    """Its weights are trained on a grid; only the range of its inputs is unknown."""
    callback = QATCallback(min_saving=0.0)
    model: Any = fit(quiet_trainer(tmp_path, [callback]), Half())
    artefact: Any = load_compressed(Half, callback.artifact)
    assert artefact.unused.spec["kernel"] == "dequantize: no input has been seen"
    x = torch.randn(3, 16)
    torch.testing.assert_close(outputs(artefact.unused, x), outputs(model.unused, x))


# -- precisions --------------------------------------------------------------------------------------------------------


class StochasticConvNet(ConvNet):
    """float16 has no room for Adam's squares."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


METHODS = {
    "ptq": lambda: PTQCallback(min_saving=0.0),
    "dynamic": lambda: PTQCallback(scheme="dynamic", num_samples=0, min_saving=0.0),
    "qat": lambda: QATCallback(min_saving=0.0),
    "lsq": lambda: QATCallback(quantizer="lsq", **ALL_BITS),
    "pact": lambda: QATCallback(quantizer="pact", start=0.3, **ALL_BITS),
}
PRECISIONS = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in METHODS for precision in ("bf16-mixed", *PRECISIONS)],
)
def test_precisions(name: str, precision: Any, tmp_path: Path) -> None:
    callback = METHODS[name]()
    model: Any = fit(quiet_trainer(tmp_path, [callback], max_epochs=2, precision=precision), StochasticConvNet())
    dtype = PRECISIONS.get(precision, torch.float32)
    assert model.conv1.weight.dtype == dtype
    artefact: Any = load_compressed(StochasticConvNet, callback.artifact)
    x = ConvNet.inputs(64)[0].to(dtype)
    found = outputs(artefact, x)
    assert found.dtype == dtype
    assert artefact.conv1.scale.dtype == torch.float32
    assert error(outputs(model, x).float(), found.float()) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
def test_a_convolutional_model_of_another_precision(dtype: torch.dtype, scheme: str) -> None:
    model = built(ConvNet).eval()
    for batch in (ConvNet.inputs(64, seed=seed)[0] for seed in range(10)):
        model.train()(batch)
    model = model.to(dtype).eval()
    x = ConvNet.inputs(64, seed=20)[0].to(dtype)
    small: Any = compress_model(model, "ptq", train_loader=[x], scheme=scheme, min_saving=0.0)
    assert small.bn1.kind == "folded_norm"
    found = outputs(small, x)
    assert found.dtype == dtype
    assert error(outputs(model, x).float(), found.float()) < 0.05


def test_a_transformer_in_bfloat16() -> None:
    model = built(Transformer).to(torch.bfloat16).eval()
    inputs = Transformer.inputs(64)
    small: Any = compress_model(model, "ptq", train_loader=[inputs], min_saving=0.0)
    assert small.encoder.layers[0].linear1.codes.dtype == torch.int8
    assert error(outputs(model, *inputs).float(), outputs(small, *inputs).float()) < 0.05
